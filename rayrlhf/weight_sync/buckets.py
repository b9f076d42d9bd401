"""Weights in buckets: named tensors in Hugging Face checkpoint naming, grouped up to a size."""

from collections.abc import Iterable, Iterator

import torch

WeightBucket = list[tuple[str, torch.Tensor]]
"""Named contiguous tensors in Hugging Face checkpoint naming, on the CPU unless a GPU transfer says otherwise."""


def bucketed(tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[WeightBucket]:
    """Group named tensors into buckets of about `bucket_bytes`; a tensor larger than that is a bucket of its own."""
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
