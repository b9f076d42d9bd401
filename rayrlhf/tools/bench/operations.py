"""Floating-point operations of a PPO step's phases, and the machine's peak.

A forward pass takes two floating-point operations per weight of a linear layer and token (Kaplan et al. 2020, section 2.1),
attention four per token, earlier token and unit of width, of which a causal mask leaves half, and the output layer two per
weight and output position. A backward pass takes twice its forward pass. Only matrix products are counted, without padding.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rayrlhf.tools.launch.model_shape import ModelShape

SIZES = (1024, 2048)
"""Sizes of the square matrices for the peak; the fastest counts."""
SECONDS = 1.0
"""Duration of each measurement."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts of one PPO step, of each prompt and its response."""

    prompts: Sequence[int]
    responses: Sequence[int]


def forward_operations(shape: ModelShape, lengths: Lengths, *, outputs: bool) -> float:
    """Return floating-point operations of one forward pass over prompts and responses.

    Args:
        outputs: include the output layer on the responses.
    """
    whole = [prompt + response for prompt, response in zip(lengths.prompts, lengths.responses, strict=True)]
    linear = 2.0 * shape.linear * sum(whole)
    attention = 2.0 * shape.layers * shape.query * sum(length * length for length in whole)
    head = 2.0 * shape.output * sum(lengths.responses) if outputs else 0.0
    return linear + attention + head


def phase_operations(shape: ModelShape, lengths: Lengths, epochs: int) -> dict[str, float]:
    """Return floating-point operations by phase of a PPO step with full training.

    All models have this shape.
    """
    with_outputs = forward_operations(shape, lengths, outputs=True)
    without = forward_operations(shape, lengths, outputs=False)
    return {
        "generate": with_outputs,
        "reference": with_outputs,
        "policy": with_outputs,
        "reward": without,
        "critic": without,
        "update_policy": 3 * epochs * with_outputs,
        "update_critic": 3 * epochs * without,
    }


def peak_operations(precision: str) -> float:
    """Return floating-point operations per second of torch's fastest square matrix product."""
    import torch

    dtype = getattr(torch, precision)
    best = 0.0
    for size in SIZES:
        first, second = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        first @ second
        count, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < SECONDS:
            first @ second
            count += 1
        best = max(best, 2.0 * size**3 * count / elapsed)
    return best


def phase_table(seconds: Mapping[str, Mapping[str, float]], operations: Mapping[str, Mapping[str, float]], peak: float) -> str:
    """Return a Markdown table of seconds by phase and contender, and shares of the peak.

    Args:
        seconds: contender -> phase -> seconds.
        operations: contender -> phase -> floating-point operations; missing phases have no share.
        peak: floating-point operations per second.
    """
    names = list(seconds)
    phases = list(dict.fromkeys(phase for one in seconds.values() for phase in one))
    lines = [f"| seconds (share of {peak / 1e9:,.0f} GFLOP/s) | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for phase in phases:
        cells = [_cell(seconds[name].get(phase), operations[name].get(phase), peak) for name in names]
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(seconds: float | None, operations: float | None, peak: float) -> str:
    if seconds is None:
        return ""
    share = f" ({operations / seconds / peak:.0%})" if operations and seconds else ""
    return f"{seconds:.2f}{share}"
