"""Weights as plain arrays, so that a bucket crosses an object store without a copy.

Every tensor becomes a NumPy array over the same memory: NumPy buffers are shared out of band and read in place by all processes
of a node, where tensors would be serialised. NumPy has no bfloat16, so sixteen-bit floats travel as int16 bit patterns, and the
dtype goes beside them by name. The way back is a view again; what comes out of an object store is read-only.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray

from rayrlhf.weight_sync.buckets import WeightBucket

_CARRIER = {torch.float32: torch.float32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


class SharedTensor(NamedTuple):
    """One weight as an array.

    Attributes:
        name: Hugging Face checkpoint name.
        dtype: torch's name of the dtype ("float32", "float16" or "bfloat16").
        data: the tensor's shape; float32, or int16 that holds the bits of a sixteen-bit float.
    """

    name: str
    dtype: str
    data: NDArray[Any]


def to_shared(bucket: WeightBucket) -> list[SharedTensor]:
    """View a bucket as arrays over the same memory.

    Args:
        bucket: named tensors on the CPU, contiguous, float32, float16 or bfloat16, none of them requiring gradients.

    Raises:
        TypeError: another dtype.
        ValueError: a tensor that is not contiguous, which could not be shipped without a hidden copy.
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
    """View arrays as tensors again, over the same memory. The arrays may be read-only; then the tensors must not be written."""
    bucket: WeightBucket = []
    with warnings.catch_warnings():
        # The bucket contract already forbids writing, and torch has no read-only tensors to say so with.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, dtype, data in shared:
            bucket.append((name, torch.from_numpy(data).view(getattr(torch, dtype))))
    return bucket
