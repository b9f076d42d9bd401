"""CPU kernels of causal attention within the segments of a row.

Autograd would keep the keys of each segment's chain, and blocks of bfloat16 scores. These kernels keep queries, keys, values
and outputs for the backward pass, so memory grows only with distinct tokens. float32 uses torch's fused CPU kernel. Its
backward pass recomputes scores in pieces too small for the matrix units of bfloat16, for which two plain products per block
take half the time.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rayrlhf.models.packed_attention import Segments

BLOCK_SCORES = 2**22
"""Scores of a block of queries, of all rows and heads: 16 MiB in float32."""
_SMALLEST, _LARGEST = 32, 256

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def kernel_dtype(query: Tensor, key: Tensor, value: Tensor) -> torch.dtype | None:
    """Return the compute dtype of CPU tensors with one head width; None without a kernel."""
    if query.device.type != "cpu" or query.shape[-1] != value.shape[-1]:
        return None
    dtypes = {torch.get_autocast_dtype("cpu")} if torch.is_autocast_enabled("cpu") else {query.dtype, key.dtype, value.dtype}
    return dtypes.pop() if dtypes in ({torch.float32}, {torch.bfloat16}) else None


class Attended(NamedTuple):
    """Inputs of a segment's attention.

    Attributes:
        query: [B, heads, L, d], of the last L keys.
        key: [B, key heads, E + L, d]; key heads divide heads.
        value: as `key`.
        mask: bool [1, 1, L, E + L], True at keys that a query attends to; None for E = 0.
        scaling: factor of the scores before the softmax.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float


class SegmentAttention(torch.autograd.Function):
    """Attention within segments, [B, T, heads, d], for tensors of one `kernel_dtype`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: "Segments", scaling: float) -> Tensor:
        """Return [B, T, heads, d]; key and value are [B, key heads, T, d]."""
        kernel = fused_attention if query.dtype == torch.float32 else block_attention
        outputs, sums = zip(*(kernel(one) for one in _attended(query, key, value, segments, scaling)), strict=True)
        joined = torch.cat([output.transpose(1, 2) for output in outputs], dim=1)  # the layout that the next layer keeps
        ctx.segments, ctx.scaling = segments, scaling
        ctx.save_for_backward(query, key, value, joined, *(one for one in sums if one is not None))
        return joined

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, those of shared keys summed over segments."""
        query, key, value, joined, *sums = ctx.saved_tensors
        segments: Segments = ctx.segments
        outputs, given = (torch.split(one.transpose(1, 2), segments.lengths, dim=2) for one in (joined, *gradients))
        totals = [torch.zeros_like(one, dtype=torch.float32) for one in (key, value)]
        parts = [torch.split(total, segments.lengths, dim=2) for total in totals]
        of_queries = []
        for number, one in enumerate(_attended(query, key, value, segments, ctx.scaling)):
            if sums:
                of_query, *others = fused_gradients(one, given[number], outputs[number], sums[number])
            else:
                of_query, *others = block_gradients(one, given[number], outputs[number])
            of_queries.append(of_query)
            chain = segments.chains[number]
            lengths = [segments.lengths[member] for member in chain]
            for added, found in zip(parts, others, strict=True):
                for member, share in zip(chain, torch.split(found, lengths, dim=2), strict=True):
                    added[member].add_(share)
        of_key, of_value = (total.to(key.dtype) for total in totals)
        return torch.cat(of_queries, dim=2), of_key, of_value, None, None


def _attended(query: Tensor, key: Tensor, value: Tensor, segments: "Segments", scaling: float) -> Iterator[Attended]:
    """Iterate over the inputs of each segment, one chain of keys at a time."""
    queries, keys, values = (torch.split(one, segments.lengths, dim=2) for one in (query, key, value))
    for one, chain, mask in zip(queries, segments.chains, segments.masks, strict=True):
        yield Attended(one, joined(keys, chain), joined(values, chain), mask, scaling)


def joined(parts: Sequence[Tensor], chain: Sequence[int]) -> Tensor:
    """Join the parts [B, heads, L, d] of a chain; one is not copied."""
    return parts[chain[0]] if len(chain) == 1 else torch.cat([parts[number] for number in chain], dim=2)


def fused_attention(one: Attended) -> tuple[Tensor, Tensor]:
    """Return output [B, heads, L, d] and log-normalizers [B, heads, L]."""
    output, sums = _fused(one.query, one.key, one.value, is_causal=one.mask is None, **_options(one))
    return output, sums


def fused_gradients(one: Attended, given: Tensor, output: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, given that of the output."""
    inputs = one.query, one.key, one.value, output, sums
    of_query, of_key, of_value = _fused_backward(given, *inputs, 0.0, one.mask is None, **_options(one))
    return of_query, of_key, of_value


def _options(one: Attended) -> dict[str, Any]:
    if one.mask is None:
        return {"scale": one.scaling}
    added = torch.zeros(one.mask.shape, dtype=one.query.dtype, device=one.mask.device)
    return {"scale": one.scaling, "attn_mask": added.masked_fill_(one.mask.logical_not(), float("-inf"))}


def block_attention(one: Attended) -> tuple[Tensor, None]:
    """Return the output [B, heads, L, d], computed in blocks of queries.

    The softmax is taken in float32.
    """
    outputs = []
    for start, end in _blocks(one):
        keys = one.key.shape[2] - one.query.shape[2] + end
        weights = _weights(one, start, end).to(one.value.dtype)
        outputs.append(_by_head(torch.matmul(weights, one.value[:, :, :keys]), end - start))
    return torch.cat(outputs, dim=2), None


def block_gradients(one: Attended, given: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, given that of the output.

    Scores are computed again. Gradients of key and value are float32. Formula: Dao et al. 2022 (FlashAttention), appendix B.4.
    """
    dtype, heads = one.query.dtype, one.key.shape[1]
    of_queries = []
    of_key, of_value = (torch.zeros_like(part, dtype=torch.float32) for part in (one.key, one.value))
    for start, end in _blocks(one):
        keys = one.key.shape[2] - one.query.shape[2] + end
        weights = _weights(one, start, end)
        block, made, queries = (_by_key_head(part[:, :, start:end], heads) for part in (given, output, one.query))
        of_value[:, :, :keys] += torch.matmul(weights.to(dtype).transpose(-1, -2), block)
        of_weights = torch.matmul(block, one.value[:, :, :keys].transpose(-1, -2)).float()
        of_weights -= (block.float() * made.float()).sum(-1, keepdim=True)
        of_scores = of_weights.mul_(weights).mul_(one.scaling).to(dtype)
        of_key[:, :, :keys] += torch.matmul(of_scores.transpose(-1, -2), queries)
        of_queries.append(_by_head(torch.matmul(of_scores, one.key[:, :, :keys]), end - start))
    return torch.cat(of_queries, dim=2), of_key, of_value


def _blocks(one: Attended) -> list[tuple[int, int]]:
    """Return start and end of each block of queries.

    A block has at most `BLOCK_SCORES` scores, or `_SMALLEST` queries.
    """
    rows, heads, length, _ = one.query.shape
    size = min(_LARGEST, max(_SMALLEST, BLOCK_SCORES // (rows * heads * one.key.shape[2])))
    return [(start, min(length, start + size)) for start in range(0, length, size)]


def _weights(one: Attended, start: int, end: int) -> Tensor:
    """Return attention weights of a block, float32 [B, key heads, groups * block, keys]."""
    earlier = one.key.shape[2] - one.query.shape[2]
    queries = _by_key_head(one.query[:, :, start:end], one.key.shape[1])
    scores = torch.matmul(queries, one.key[:, :, : earlier + end].transpose(-1, -2)).float().mul_(one.scaling)
    future = torch.full((end - start, end - start), float("-inf"), device=scores.device).triu(1)
    _by_head(scores, end - start)[..., earlier + start :] += future
    return scores.softmax(-1)


def _by_key_head(part: Tensor, heads: int) -> Tensor:
    """Return [B, heads, L, d] as [B, key heads, groups * L, d]."""
    return part.reshape(part.shape[0], heads, -1, part.shape[-1])


def _by_head(part: Tensor, length: int) -> Tensor:
    """Return a view [B, heads, L, n] of [B, key heads, groups * L, n]."""
    return part.view(part.shape[0], -1, length, part.shape[-1])
