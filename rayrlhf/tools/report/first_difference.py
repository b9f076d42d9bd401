"""First difference of two runs: step, phase, sample or metric, and likely causes.

A step is compared in the order in which it is made: prompts, responses, rewards, experience, update, weight sync. The first
three are compared by sample, as far as samples are stored, and all by the metrics that depend on them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.errors import UserError
from rayrlhf.observe.html.page import Block, DataTable, Heading
from rayrlhf.observe.metrics import NON_FINITE
from rayrlhf.observe.samples import read_samples
from rayrlhf.tools.report.difference_causes import Phase, likely_causes
from rayrlhf.tools.report.run_blocks import Notice
from rayrlhf.tools.report.run_files import Row
from rayrlhf.tools.report.run_view import RunView

LARGE = 0.01
"""Relative difference of a metric above which rounding alone does not explain it."""
PHASES: Mapping[Phase, tuple[str, ...]] = {
    "prompts": ("tokens/queries", "ledger/issued"),
    "responses": ("tokens/responses", "val/num_eos", "val/sequence_lengths", "ledger/", "environment/", "sampling/tokens"),
    "rewards": ("objective/scores", "reward/", "ppo/mean_scores", "ppo/std_scores", "frac_reward", "sampling/prompts"),
    "experience": ("objective/", "ppo/mean_non_score", "ppo/returns", "ppo/val/mean", "ppo/val/var", "sampling/", "context/"),
    "update": ("loss", "policy/", "critic/", "ppo/", "val/", "lr", "grad_norm", "accuracy", "margin", "mean_reward", "tokens/"),
    "weight sync": ("sync/version", "weight_sync/"),
    "evaluation": ("evaluation/",),
}
"""Phase -> beginnings of the metrics that show it; the first that fits counts."""
IGNORED = ("time", "speed/", "memory/", "sync/seconds", "alarm/", "rollout/", "checkpoint/", "step", "sampling/staleness")
_CHECKED: Sequence[tuple[Phase, str]] = (("prompts", "prompt"), ("responses", "response"), ("rewards", "score"))


@dataclass(frozen=True, slots=True)
class Difference:
    """First difference of two runs.

    Attributes:
        what: sample or metric with both values.
        size: relative difference of a number; None for anything else.
        causes: with evidence, the likeliest first.
    """

    step: int
    phase: Phase
    what: str
    size: float | None
    causes: Sequence[str]

    def lines(self) -> list[str]:
        """Return the difference in words."""
        size = "" if self.size is None else f" (relative {self.size:.2g})"
        return [f"step {self.step}, {self.phase}: {self.what}{size}", *(f"likely cause: {cause}" for cause in self.causes)]


def first_difference(one: RunView, two: RunView, tolerance: float = 0.0) -> Difference | None:
    """Return the first difference of two runs over their common steps; None without any.

    Args:
        tolerance: relative difference of metrics that does not count.
    """
    first, second = by_step(one.rows), by_step(two.rows)
    for step in sorted(first.keys() & second.keys()):
        samples = _first_sample(_samples(one.folder, step), _samples(two.folder, step))
        metrics = _first_metric(first[step], second[step], tolerance)
        places: list[Phase] = list(PHASES)
        found = min(
            (item for item in (samples, metrics) if item is not None), key=lambda item: places.index(item[0]), default=None
        )
        if found is not None:
            phase, what, size = found
            return Difference(step, phase, what, size, likely_causes(one, two, phase, step, size))
    return None


def difference_lines(one: RunView, two: RunView) -> list[str]:
    """Return the first difference, and the first large one, in words."""
    any_size, large = first_difference(one, two), first_difference(one, two, LARGE)
    common = len(by_step(one.rows).keys() & by_step(two.rows).keys())
    if any_size is None:
        return [f"no difference in {common} common steps" if common else "no common steps"]
    lines = ["first difference: " + any_size.lines()[0], *any_size.lines()[1:]]
    if large is not None and (large.step, large.what) != (any_size.step, any_size.what):
        lines += [f"first difference above {LARGE:.0%}: " + large.lines()[0], *large.lines()[1:]]
    elif large is None:
        lines.append(f"no metric differs by more than {LARGE:.0%} in {common} common steps")
    return lines


def difference_section(one: RunView, two: RunView) -> Iterator[Block]:
    """Yield the first difference for the page that compares two runs."""
    lines = difference_lines(one, two)
    yield Heading("First difference")
    yield Notice("good" if lines[0].startswith("no difference") else "info", lines[0], lines[1:])
    found = first_difference(one, two)
    if found is not None:
        first, second = by_step(one.rows)[found.step], by_step(two.rows)[found.step]
        rows = [
            (name, phase, first[name], second[name], _relative(first[name], second[name]))
            for phase, name in _ordered(first, second)
            if _relative(first[name], second[name])
        ]
        yield DataTable([f"metric at step {found.step}", "phase", one.name, two.name, "relative difference"], rows)


def by_step(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    """Return all metrics of each step."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        found.setdefault(int(row["step"]), {}).update(row)
    return found


def phase_of(metric: str) -> Phase | None:
    """Return the phase that a metric shows first; None for times and memory."""
    if metric.startswith(IGNORED):
        return None
    return next((phase for phase, names in PHASES.items() if metric.startswith(names)), "update")


def _ordered(first: Mapping[str, float], second: Mapping[str, float]) -> list[tuple[Phase, str]]:
    places = list(PHASES)
    known = [(phase, name) for name in first if name in second and (phase := phase_of(name)) is not None]
    return sorted(known, key=lambda item: places.index(item[0]))


def _first_metric(
    first: Mapping[str, float], second: Mapping[str, float], tolerance: float
) -> tuple[Phase, str, float | None] | None:
    for phase, name in _ordered(first, second):
        size = _relative(first[name], second[name])
        if size > tolerance:
            return phase, f"{name} is {first[name]:.9g} and {second[name]:.9g}", size
    if first.get(NON_FINITE, 0.0) != second.get(NON_FINITE, 0.0):
        names = sorted(name for name in first.keys() ^ second.keys() if phase_of(name) is not None and name != NON_FINITE)
        return "update", f"{', '.join(names[:3]) or 'a metric'} is not finite in one run", None
    return None


def _first_sample(one: Sequence[Mapping[str, Any]], two: Sequence[Mapping[str, Any]]) -> tuple[Phase, str, float | None] | None:
    """Return the first stored sample of a step with another prompt, response or score."""
    if not one or not two:
        return None
    for (phase, column), place in ((check, row) for check in _CHECKED for row in range(min(len(one), len(two)))):
        mine, other = one[place], two[place]
        name = f"sample {mine.get('sample')} of prompt {mine.get('prompt_id')}"
        if phase == "prompts" and (mine.get("prompt_id"), mine.get("sample")) != (other.get("prompt_id"), other.get("sample")):
            return phase, f"{name} is sample {other.get('sample')} of prompt {other.get('prompt_id')} in the other run", None
        if mine.get(column) != other.get(column) and not (_is_nan(mine.get(column)) and _is_nan(other.get(column))):
            return phase, f"{name}: {column} {_shown(repr(mine.get(column)), repr(other.get(column)))}", None
    return None


def _shown(one: str, two: str, width: int = 60) -> str:
    """Return two texts from shortly before their first difference on."""
    start = max(
        next((place for place, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))) - 20, 0
    )
    parts = [
        f"{'...' if start else ''}{text[start : start + width]}{'...' if len(text) > start + width else ''}"
        for text in (one, two)
    ]
    return " and ".join(parts)


def _samples(folder: Path, step: int) -> list[dict[str, Any]]:
    try:
        return read_samples(folder / "samples", step)
    except UserError:
        return []  # a damaged file; the page says so


def _relative(one: float, two: float) -> float:
    if one == two or (_is_nan(one) and _is_nan(two)):
        return 0.0
    return abs(one - two) / max(abs(one), abs(two))


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
