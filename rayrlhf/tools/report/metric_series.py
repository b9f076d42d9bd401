"""Metrics over steps, downsampled for charts of long runs without losing spikes.

A segment of steps is drawn by its lowest and highest values, in order, and smoothed through its mean.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rayrlhf.tools.report.run_files import Row

SEGMENTS = 250


@dataclass(frozen=True, slots=True)
class Series:
    """One metric of a run: increasing steps and their values."""

    steps: Sequence[float]
    values: Sequence[float]

    @property
    def last(self) -> float:
        """The newest value."""
        return self.values[-1]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A series for a chart: thin `points` and `means` to smooth, each (steps, values)."""

    points: tuple[list[float], list[float]]
    means: tuple[list[float], list[float]]


def series_by_name(rows: Iterable[Row]) -> dict[str, Series]:
    """Return every metric's series; of a repeated step the last value counts."""
    values: defaultdict[str, dict[float, float]] = defaultdict(dict)
    for row in rows:
        for name, value in row.items():
            if name != "step":
                values[name][row["step"]] = value
    return {name: _series(by_step) for name, by_step in values.items()}


def thinned(series: Series, segments: int = SEGMENTS) -> Drawn:
    """Return at most `2 * segments` points and `segments` means of a series."""
    count = len(series.steps)
    if count <= 2 * segments:
        steps, values = [_short(step) for step in series.steps], [_short(value) for value in series.values]
        return Drawn((steps, values), (steps, values))
    xs, ys, mean_xs, mean_ys = list[float](), list[float](), list[float](), list[float]()
    for number in range(segments):
        start, end = number * count // segments, (number + 1) * count // segments
        segment = series.values[start:end]
        ends = {min(range(start, end), key=series.values.__getitem__), max(range(start, end), key=series.values.__getitem__)}
        for place in sorted(ends):
            xs.append(_short(series.steps[place]))
            ys.append(_short(series.values[place]))
        mean_xs.append(_short(series.steps[(start + end) // 2]))
        mean_ys.append(_short(sum(segment) / len(segment)))
    return Drawn((xs, ys), (mean_xs, mean_ys))


def per_step(series: Series) -> Series:
    """Return the increments of a running total per step."""
    pairs = list(zip(series.steps, series.values, strict=True))
    steps, growth = list[float](), list[float]()
    for (step, value), (next_step, next_value) in pairwise(pairs):
        steps.append(next_step)
        growth.append((next_value - value) / (next_step - step))
    return Series(steps, growth)


def quotient(above: Series, below: Series) -> Series:
    """Return the quotient of two series at common steps with a nonzero divisor."""
    divisor: Mapping[float, float] = dict(zip(below.steps, below.values, strict=True))
    places = [(step, value) for step, value in zip(above.steps, above.values, strict=True) if divisor.get(step)]
    return Series([step for step, _ in places], [value / divisor[step] for step, value in places])


def _series(by_step: Mapping[float, float]) -> Series:
    steps = sorted(by_step)
    return Series(steps, [by_step[step] for step in steps])


def _short(value: float) -> float:
    """Round to six digits, more than a screen resolves."""
    return value if value == 0 or isinstance(value, int) or not math.isfinite(value) else float(f"{value:.6g}")
