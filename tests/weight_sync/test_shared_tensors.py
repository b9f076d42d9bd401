"""Weights as arrays: the same memory there and back."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.weight_sync.buckets import from_shared, to_shared

dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
shapes = st.lists(st.integers(0, 5), max_size=3)


@given(st.lists(st.tuples(dtypes, shapes), max_size=4), st.integers(0, 2**31))
def test_a_bucket_comes_back_bit_for_bit_over_the_same_memory(kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    bucket = [(f"layer.{i}", torch.randn(shape, generator=generator).to(dtype)) for i, (dtype, shape) in enumerate(kinds)]
    back = from_shared(to_shared(bucket))
    assert [name for name, _ in back] == [name for name, _ in bucket]
    for (_, there), (_, here) in zip(bucket, back, strict=True):
        assert here.dtype == there.dtype
        assert here.shape == there.shape
        assert torch.equal(here, there)
        assert here.data_ptr() == there.data_ptr() or not there.numel()


@given(dtypes, st.integers(0, 2**31))
def test_arrays_travel_out_of_band_and_may_be_read_only(dtype, seed):
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)
    buffers: list[pickle.PickleBuffer] = []
    message = pickle.dumps(to_shared([("w", weight)]), protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((_, received),) = from_shared(pickle.loads(message, buffers=[bytes(buffer.raw()) for buffer in buffers]))
    assert torch.equal(received, weight)


def test_a_parameter_that_requires_gradients_is_shared_without_them():
    ((_, name, data),) = to_shared([("w", torch.nn.Parameter(torch.ones(2)))])
    assert name == "float32"
    np.testing.assert_array_equal(data, [1, 1])


def test_what_cannot_be_shared_is_refused_by_name():
    with pytest.raises(TypeError, match=r"layer\.0: torch.int64 cannot be shared"):
        to_shared([("layer.0", torch.zeros(2, dtype=torch.int64))])
    with pytest.raises(ValueError, match=r"layer\.1: not contiguous"):
        to_shared([("layer.1", torch.zeros(2, 3).t())])
