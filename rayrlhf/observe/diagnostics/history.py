"""Metrics of a run as series, the input of checks.

Missing and non-finite values are left out.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

EARLY = 3
"""Steps at the start whose mean is the baseline."""
RECENT = 3
"""Newest steps whose mean is the current value; a single step is noise."""


class Point(NamedTuple):
    """A metric's value at a step."""

    step: int
    value: float


class Change(NamedTuple):
    """A metric before and now: means over `EARLY` and `RECENT` steps, which do not overlap."""

    before: float
    now: float
    since: int


class History:
    """Rows of `metrics.jsonl`, evaluations included.

    Args:
        rows: each with `step`; a step may occur twice, once for itself and once for the evaluation after it.
    """

    def __init__(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        self._rows = rows

    def series(self, name: str) -> list[Point]:
        """Return all finite values of a metric, in order."""
        points = []
        for row in self._rows:
            step, value = row.get("step"), row.get(name)
            if step is not None and value is not None and math.isfinite(value):
                points.append(Point(int(step), float(value)))
        return points

    def recent(self, name: str, count: int = RECENT) -> list[Point]:
        """Return the newest `count` values; empty while there are fewer."""
        points = self.series(name)
        return points[-count:] if len(points) >= count else []

    def all_recent(self, name: str, low: float = -math.inf, high: float = math.inf, count: int = RECENT) -> list[Point]:
        """Return the newest `count` values if all lie strictly between the bounds, else []."""
        points = self.recent(name, count)
        return points if all(low < point.value < high for point in points) else []

    def change(self, name: str) -> Change | None:
        """Return a metric's baseline and current value; None with too few steps."""
        points = self.series(name)
        if len(points) < EARLY + RECENT:
            return None
        newest = points[-RECENT:]
        return Change(fmean(point.value for point in points[:EARLY]), fmean(point.value for point in newest), newest[0].step)


def mean(points: Sequence[Point]) -> float:
    """Return the mean of the points' values."""
    return fmean(point.value for point in points)
