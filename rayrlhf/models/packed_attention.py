"""Attention within each sample of a packed row, and not across samples.

All other layers work on single tokens, so a packed row costs exactly its tokens: no padding, and no mask of squared length,
which transformers builds from restarting positions. It replaces the `sdpa` kernel only. FlashAttention supports restarts
itself, and models with sliding-window attention keep the mask of transformers.

Samples that begin with the same tokens may share them: a segment then attends to the segments it continues, up to the start of
its sample, and to itself. The fused CPU kernel gives a token the same bits as in a sample of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayrlhf.library_types import PreTrainedModel
from rayrlhf.models.segment_kernels import SegmentAttention, joined, kernel_dtype

NAME = "rayrlhf_segments"
"""Name of the function in transformers' registry."""


class SegmentsError(Exception):
    """A model does not pass `segments` to its attention."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Segments of a packed row.

    Attributes:
        lengths: tokens of each segment.
        chains: numbers of the segments that each one attends to, from the start of its sample to itself.
        masks: bool [1, 1, length, tokens of the chain], True at keys that a token attends to; None for causal attention alone.
    """

    lengths: list[int]
    chains: list[list[int]]
    masks: list[Tensor | None]

    @classmethod
    def of(cls, lengths: list[int], parents: Sequence[int] | None, device: torch.device) -> "Segments":
        """Build from the segment that each one continues, or -1.

        Without `parents` each is a sample.
        """
        chains: list[list[int]] = []
        masks: list[Tensor | None] = []
        for number, parent in enumerate(parents or [-1] * len(lengths)):
            chains.append([*chains[parent], number] if parent >= 0 else [number])
            keys = sum(lengths[member] for member in chains[number])
            ones = torch.ones(1, 1, lengths[number], keys, dtype=torch.bool, device=device) if parent >= 0 else None
            masks.append(None if ones is None else ones.tril(keys - lengths[number]))
        return cls(lengths, chains, masks)

    def positions(self, device: torch.device) -> Tensor:
        """Return each token's position in its sample, int64 [1, sum of lengths]."""
        starts = [sum(self.lengths[member] for member in chain[:-1]) for chain in self.chains]
        parts = [torch.arange(start, start + length) for start, length in zip(starts, self.lengths, strict=True)]
        return torch.cat(parts)[None].to(device)


_NOT_PASSED = Segments([], [], [])


def attend_within_segments(model: PreTrainedModel) -> bool:
    """Make a transformers model attend by segments, if it supports that.

    Its forward must then be passed `segments` every time.

    Returns:
        True if it does. If not, restarting `position_ids` give the same result through a mask.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None or kinds != {"full_attention"}
    if windowed or config._attn_implementation != "sdpa" or not getattr(model, "_supports_attention_backend", False):
        return False
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _segment_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)
    return True


def _segment_attention(
    module: object,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = _NOT_PASSED,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention of [B, heads, T, d]; B = 1 with several segments.

    Raises:
        SegmentsError: the model does not pass on the arguments of its forward.
    """
    if segments is _NOT_PASSED:
        raise SegmentsError(f"{type(module).__name__} does not pass `segments`")
    scaling = rest.get("scaling")
    dtype = kernel_dtype(query, key, value)
    if dtype is not None and not rest.get("dropout"):
        parts = segments or Segments.of([query.shape[2]], None, query.device)
        inputs = query.to(dtype), key.to(dtype), value.to(dtype)
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        attention: Tensor = SegmentAttention.apply(*inputs, parts, factor)  # type: ignore[no-untyped-call]
        return attention, None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if segments is None:
        return sdpa_attention_forward(module, query, key, value, None, **rest)[0], None
    queries, keys, values = (torch.split(tensor, segments.lengths, dim=2) for tensor in (query, key, value))
    found = [
        sdpa_attention_forward(module, query, joined(keys, chain), joined(values, chain), mask, **rest)[0]
        for query, chain, mask in zip(queries, segments.chains, segments.masks, strict=True)
    ]
    return torch.cat(found, dim=1), None


def _no_mask(*_: object, **__: object) -> None:
    """Return no mask: the kernel is causal, and real tokens do not attend to padding."""
