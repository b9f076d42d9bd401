"""Attention inside each sample of a packed row, and none across: samples lie end to end and are attended to one by one.

Every other layer works on single tokens, so a packed row costs exactly its tokens: no padding, and no mask of the square of its
length, which is what transformers makes of positions that restart. It takes the place of the `sdpa` kernel only; FlashAttention
reads the restarts itself, and models with a window on their attention keep the mask of transformers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rayrlhf.config.library_types import PreTrainedModel
from rayrlhf.models.block_attention import LONGEST, block_attention

NAME = "rayrlhf_segments"
"""Under which transformers knows the function."""


def attend_within_segments(model: PreTrainedModel) -> bool:
    """Make a transformers model attend by segments where it can; its forward must then be given `segments` every time.

    Returns:
        Whether it does. If not, restarting `position_ids` give the same result by way of a mask.
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
    segments: list[int] | None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Causal attention of [B, heads, T, d]; a row of several segments has B = 1. `segments` missing is a bug of the model."""
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
    """Causality is the kernel's own, and padding stands on the right, where no real token looks."""
