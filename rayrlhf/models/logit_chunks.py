"""Size of a chunk of logits by device; imports no torch, for the memory plan."""

CHUNK_BYTES = 24 * 2**20
"""Bytes of float32 logits that exist at a time on a CPU."""
DEVICE_SHARE = 64
"""A chunk takes at most this part of a GPU's memory."""
LARGEST_CHUNK = 2**30
"""Largest chunk on a GPU. The backward pass reads and writes the whole gradient of the output layer once per chunk. With a
CPU's chunks (41 rows at a vocabulary of 152k) that is 872 GB for 4096 tokens of a 7B model, calculated and not measured."""


def chunk_bytes(device_bytes: int | None) -> int:
    """Return the bytes of a chunk on a GPU of `device_bytes`, or on a CPU."""
    if device_bytes is None:
        return CHUNK_BYTES
    return max(CHUNK_BYTES, min(device_bytes // DEVICE_SHARE, LARGEST_CHUNK))
