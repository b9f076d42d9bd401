"""Bounded set of token counts in vLLM's CPU matrix products, to bound a replica's memory.

oneDNN builds a kernel for every shape, and a batch of prompts nearly always has a new number of tokens: about 0.3 MB each for a
small model, kept 32 a layer by vLLM and 1,024 in all by oneDNN. So numbers above `EXACT` are rounded up to one of eight per
octave, as GPUs capture their graphs for some batch sizes only. A smaller cache in oneDNN would bound the memory too, but would
build the same kernels repeatedly (measured: 9 to 11 % of the speed of a tiny model).
"""

from collections.abc import Callable
from typing import Any

import torch

EXACT = 16
"""Numbers up to this one have a kernel each."""

Multiply = Callable[[Any, torch.Tensor, torch.Tensor | None], torch.Tensor]


def rounded(tokens: int) -> int:
    """Return the padded number of tokens, at most 1/8 more.

    There are eight numbers from each power of two to the next.
    """
    if tokens <= EXACT:
        return tokens
    step = 1 << ((tokens - 1).bit_length() - 4)
    return -(-tokens // step) * step


def with_few_shapes(multiply: Multiply) -> Multiply:
    """Wrap vLLM's `onednn_mm(handler, x, bias)` to pad x with rows of zeros.

    Shapes are x (..., handler.k) -> (..., handler.n).
    """

    def padded(handler: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = x.numel() // handler.k
        extra = rounded(tokens) - tokens
        if not extra:
            return multiply(handler, x, bias)
        rows = torch.nn.functional.pad(x.reshape(tokens, handler.k), (0, 0, 0, extra))
        return multiply(handler, rows, bias)[:tokens].view(*x.shape[:-1], handler.n)

    return padded


def bound_kernels() -> None:
    """Patch vLLM's layers in this process; they look the function up at every call.

    A second call has no effect.
    """
    from vllm import _custom_ops

    if not hasattr(_custom_ops, "rayrlhf_few_shapes"):
        _custom_ops.rayrlhf_few_shapes = True
        _custom_ops.onednn_mm = with_few_shapes(_custom_ops.onednn_mm)
