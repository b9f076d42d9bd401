"""Causal attention on a CPU by blocks of queries, each against the keys up to its own end.

Torch's fused kernel for CPUs keeps no scores, and pays for it: its backward pass computes them again in pieces too small for
the matrix units. For sequences of usual length the scores fit into memory, and two plain products a block take half the time
in bfloat16. In float32 they gain nothing, and longer sequences are left to the kernel whose memory grows with length only.
"""

import torch
from torch import Tensor

LONGEST = 1024
"""Most tokens for which scores are kept: heads x tokens / 2 numbers a token and layer."""
_SMALL, _LARGE = 128, 256


def block_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of each position to itself and those before it.

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
