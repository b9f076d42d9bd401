"""k-curves from scored answers: a mean and an interval per model, ablation and k; pure.

A question's score is its mean over the seeds. The interval resamples questions, because seeds of one question are not
independent observations.
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
        k: requested demonstrations.
        mean: of the questions' scores.
        low: lower end of its 95 % interval.
        high: upper end of its 95 % interval.
        copying: expected accuracy of copying an answer from the context without reading the question.
        shown: mean number of demonstrations in the context.
        dropped: total number of demonstrations that did not fit.
        questions: number of questions.
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
    """Return the points of a model, sorted by ablation and k.

    Args:
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
