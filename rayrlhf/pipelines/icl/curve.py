"""From scored answers to a k-curve: a mean for every model, ablation and k, with an interval over questions; pure.

A question's score is its mean over the seeds, and the interval resamples questions: seeds of one question are no independent
observations.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rayrlhf.observe.resampling import bootstrap_mean


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a curve.

    Attributes:
        model: its name.
        ablation: of the demonstrations.
        k: demonstrations asked for.
        mean: of the questions' scores.
        low: of its 95 % interval.
        high: likewise.
        copying: expected accuracy of copying an answer from the context, whatever the question.
        shown: demonstrations in the context, on average.
        dropped: demonstrations that did not fit, in all.
        questions: how many.
    """

    model: str
    ablation: str
    k: int
    mean: float
    low: float
    high: float
    copying: float
    shown: float
    dropped: int
    questions: int

    def as_row(self) -> dict[str, Any]:
        """Return the point for JSON."""
        return asdict(self)


def curve(model: str, rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Return the points of a model, by ablation and k.

    Args:
        model: its name.
        rows: `ablation`, `k`, `source` (the question), `score`, `copying`, `shown` and `dropped` of every answer.
    """
    groups: defaultdict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["ablation"], row["k"]].append(row)
    points = []
    for (ablation, k), members in sorted(groups.items()):
        scores: defaultdict[int, list[float]] = defaultdict(list)
        for row in members:
            scores[row["source"]].append(row["score"])
        interval = bootstrap_mean([float(np.mean(scores[question])) for question in sorted(scores)])
        points.append(
            Point(
                model,
                ablation,
                k,
                interval.mean,
                interval.low,
                interval.high,
                float(np.mean([row["copying"] for row in members])),
                float(np.mean([row["shown"] for row in members])),
                sum(row["dropped"] for row in members),
                len(scores),
            )
        )
    return points
