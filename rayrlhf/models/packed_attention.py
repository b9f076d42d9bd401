"""Attention within each sample of a packed row, and not across samples.

All other layers work on single tokens, so a packed row costs exactly its tokens: no padding, and no mask of squared length,
which transformers builds from restarting positions. It replaces the `sdpa` kernel only. FlashAttention supports restarts
itself, and models with sliding-window attention keep the mask of transformers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rayrlhf.library_types import PreTrainedModel
from rayrlhf.models.block_attention import LONGEST, block_attention

_NOT_PASSED: list[int] = []
NAME = "rayrlhf_segments"
"""Name of the function in transformers' registry."""


class SegmentsError(Exception):
    """A model does not pass `segments` to its attention."""


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
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: list[int] | None = _NOT_PASSED,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention of [B, heads, T, d]; B = 1 with several segments.

    Raises:
        SegmentsError: the model does not pass on the arguments of its forward.
    """
    if segments is _NOT_PASSED:
        raise SegmentsError(f"{type(module).__name__} does not pass `segments`")
    if segments is None:
        return _attention(module, query, key, value, rest), None
    split = (torch.split(tensor, segments, dim=2) for tensor in (query, key, value))
    return torch.cat([_attention(module, q, k, v, rest) for q, k, v in zip(*split, strict=True)], dim=1), None


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, rest: Mapping[str, Any]) -> Tensor:
    """Attention of whole sequences, [B, L, heads, d]."""
    scaling = rest.get("scaling")
    fits = value.dtype == torch.bfloat16 and query.device.type == "cpu" and query.shape[2] <= LONGEST
    if fits and not rest.get("dropout"):
        return block_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output: Tensor = sdpa_attention_forward(module, query, key, value, None, **rest)[0]
    return output


def _no_mask(*_: Any, **__: Any) -> None:
    """Return no mask: the kernel is causal, and real tokens do not attend to padding."""
