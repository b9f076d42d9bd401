"""Which pairs struggle: a cut through all scores, found once, then applied row by row in a second pass.

A cut orders pairs by (score, row), so that a share of the dataset is met exactly and ties fall the same way in every run.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayrlhf.config.presft import SelectSection

HISTOGRAM_BINS = 256
HIGHEST = 100.0


@dataclass(frozen=True, slots=True)
class Cut:
    """Pairs up to and including (`score`, `row`) are selected; `row` -1 leaves out all pairs of exactly that score."""

    score: float
    row: int = -1

    def selects(self, score: float, row: int) -> bool:
        """Whether a pair struggles."""
        return (score, row) <= (self.score, self.row)


NOTHING = Cut(0.0)
"""Selects no pair."""


def find_cut(section: SelectSection, scores: NDArray[np.float64], rows: NDArray[np.int64]) -> Cut:
    """Return the cut that a rule makes.

    Args:
        section: the rule and its value.
        scores: float64 [N], BLEU in [0, 100].
        rows: int64 [N], the id of each pair.
    """
    if section.rule == "gap":
        edge = otsu_threshold(scores)
        return NOTHING if edge is None else Cut(edge)
    assert section.value is not None
    return Cut(section.value) if section.rule == "threshold" else lowest(scores, rows, section.value)


def lowest(scores: NDArray[np.float64], rows: NDArray[np.int64], share: float) -> Cut:
    """Return the cut below which lie exactly floor(`share` x N) pairs, those of lowest (score, row)."""
    count = int(share * len(scores) + 1e-9)  # 0.29 * 100 is 28.999999999999996
    if count == 0:
        return NOTHING
    last = np.lexsort((rows, scores))[count - 1]
    return Cut(float(scores[last]), int(rows[last]))


def otsu_threshold(scores: NDArray[np.float64]) -> float | None:
    """Return the histogram edge that separates two groups best, or None where there are no two groups.

    Otsu 1979, "A threshold selection method from gray-level histograms": of all edges the one with the largest variance between
    the two sides, w0 w1 (m0 - m1)^2. Where several edges divide the pairs alike (an empty stretch), the middle one.
    """
    # Equal texts score 100.00000000000004, which a histogram would leave out.
    counts, edges = np.histogram(np.minimum(scores, HIGHEST), bins=HISTOGRAM_BINS, range=(0.0, HIGHEST))
    centres = (edges[:-1] + edges[1:]) / 2
    below, mass = np.cumsum(counts)[:-1], np.cumsum(counts * centres)[:-1]
    above = len(scores) - below
    both = (below > 0) & (above > 0)
    if not both.any():
        return None
    difference = mass[both] / below[both] - (np.sum(counts * centres) - mass[both]) / above[both]
    between = below[both] * above[both] * difference**2
    best = np.flatnonzero(both)[np.isclose(between, between.max(), rtol=1e-12, atol=0.0)]
    return float(edges[best[len(best) // 2] + 1])
