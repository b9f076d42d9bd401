"""Few different numbers of tokens in vLLM's matrix products on a CPU, so that a replica's memory soon stops growing.

oneDNN builds a kernel for every shape it multiplies, and a batch of prompts has a new number of tokens nearly every time: about
0.3 MB each for a small model, kept 32 a layer by vLLM and 1,024 in all by oneDNN. So numbers above `EXACT` are rounded up to
one of eight an octave, as GPUs capture their graphs for some batch sizes only. A smaller cache in oneDNN would bound the memory
too, but would build the same kernels over and over (measured: 9 to 11 % of the speed of a tiny model).
"""

from collections.abc import Callable
from typing import Any

import torch

EXACT = 16
"""Up to here every number has a kernel of its own."""

Multiply = Callable[[Any, torch.Tensor, torch.Tensor | None], torch.Tensor]


def rounded(tokens: int) -> int:
    """The number of tokens that is computed for so many: at most 1/8 more, eight numbers from a power of two to the next."""
    if tokens <= EXACT:
        return tokens
    step = 1 << ((tokens - 1).bit_length() - 4)
    return -(-tokens // step) * step


def with_few_shapes(multiply: Multiply) -> Multiply:
    """Wrap vLLM's `onednn_mm(handler, x, bias)`, x (..., handler.k) -> (..., handler.n), to add rows of zeros to x."""

    def padded(handler: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        tokens = x.numel() // handler.k
        extra = rounded(tokens) - tokens
        if not extra:
            return multiply(handler, x, bias)
        rows = torch.nn.functional.pad(x.reshape(tokens, handler.k), (0, 0, 0, extra))
        return multiply(handler, rows, bias)[:tokens].view(*x.shape[:-1], handler.n)

    return padded


def bound_kernels() -> None:
    """Let the layers of vLLM in this process multiply so; they look the function up at every call. Again has no effect."""
    from vllm import _custom_ops

    if not hasattr(_custom_ops, "rayrlhf_few_shapes"):
        _custom_ops.rayrlhf_few_shapes = True
        _custom_ops.onednn_mm = with_few_shapes(_custom_ops.onednn_mm)
