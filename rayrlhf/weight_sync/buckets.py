"""Buckets of weights, and their zero-copy views as arrays for the object store.

A bucket is a list of named tensors in Hugging Face checkpoint naming, grouped up to a size. NumPy buffers are pickled out of
band and read in place by all processes of a node, where tensors would be serialized. NumPy has no bfloat16, so sixteen-bit
floats travel as int16 bit patterns together with the name of their dtype. Arrays from the object store are read-only.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

SyncDtype = Literal["float32", "bfloat16"]
"""Data types in which weights travel to the rollout engines."""
WeightBucket = list[tuple[str, torch.Tensor]]
"""Named contiguous tensors in Hugging Face checkpoint naming, on the CPU except in transfers from GPU to GPU."""
_CARRIER = {torch.float32: torch.float32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class SharedTensor(NamedTuple):
    """One weight as an array.

    Attributes:
        name: Hugging Face checkpoint name.
        dtype: torch's name of the dtype ("float32", "float16" or "bfloat16").
        data: the tensor's shape; float32, or int16 with the bits of a sixteen-bit float.
    """

    name: str
    dtype: str
    data: NDArray[np.float32] | NDArray[np.int16]


def bucketed(tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[WeightBucket]:
    """Group named tensors into buckets of at most `bucket_bytes`, or of one larger tensor."""
    bucket: WeightBucket = []
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if bucket and size + nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += nbytes
    if bucket:
        yield bucket


def to_shared(bucket: WeightBucket) -> list[SharedTensor]:
    """View a bucket as arrays over the same memory.

    Args:
        bucket: contiguous CPU tensors of float32, float16 or bfloat16.

    Raises:
        TypeError: another dtype.
        ValueError: a tensor that is not contiguous, which would need a hidden copy.
    """
    shared = []
    for name, tensor in bucket:
        if tensor.dtype not in _CARRIER:
            raise TypeError(f"weight {name}: {tensor.dtype} cannot be shared, expected float32, float16 or bfloat16")
        if not tensor.is_contiguous():
            raise ValueError(f"weight {name}: not contiguous, so it cannot be shared without a copy")
        data = tensor.detach().view(_CARRIER[tensor.dtype]).numpy()
        shared.append(SharedTensor(name, str(tensor.dtype).removeprefix("torch."), data))
    return shared


def from_shared(shared: Sequence[SharedTensor]) -> WeightBucket:
    """View arrays as tensors over the same memory, which must not be written."""
    bucket: WeightBucket = []
    with warnings.catch_warnings():
        # Receivers must not write to a bucket anyway, and torch has no read-only tensors.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, dtype, data in shared:
            bucket.append((name, torch.from_numpy(data).view(getattr(torch, dtype))))
    return bucket
