"""Causal attention on a CPU in blocks of queries.

Each block attends to the keys up to its own end. Torch's fused CPU kernel keeps no scores; its backward pass recomputes them in
pieces too small for the matrix units. For sequences of usual length the scores fit into memory, and two plain products per
block take half the time in bfloat16. In float32 they gain nothing, and longer sequences use the fused kernel, whose memory
grows only linearly with length.
"""

import torch
from torch import Tensor

LONGEST = 1024
"""Maximum tokens for which scores are kept: heads x tokens / 2 numbers per token and layer."""
_SMALL, _LARGE = 128, 256


def block_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of each position to itself and earlier ones.

    Args:
        query: [B, heads, L, d].
        key: [B, key heads, L, d]; key heads divide heads.
        value: as `key`.
        scaling: factor of the scores before the softmax, which is taken in float32.

    Returns:
        [B, L, heads, d].
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    length = query.shape[2]
    size = _SMALL if length <= 4 * _SMALL else _LARGE
    query = query * scaling
    future = torch.full((size, size), float("-inf"), device=query.device).triu(1)
    blocks = []
    for start in range(0, length, size):
        end = min(length, start + size)
        scores = torch.matmul(query[:, :, start:end], key[:, :, :end].transpose(-1, -2)).float()
        scores[..., start:end] += future[: end - start, : end - start]
        blocks.append(torch.matmul(scores.softmax(-1).to(value.dtype), value[:, :, :end]))
    return torch.cat(blocks, dim=2).transpose(1, 2)
