"""What the report draws of a round, read part by part: the histogram, a sample of points, the lowest scores."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrlhf.presft.layout import RoundFolder
from rayrlhf.presft.selection import HIGHEST

BINS = 50
MOST_POINTS = 2000
MOST_STRUGGLING = 100


@dataclass(frozen=True, slots=True)
class RoundView:
    """One round, small enough to draw.

    Attributes:
        counts: pairs in each bin of BLEU.
        edges: of the bins, one more.
        lengths: characters of the originals, of an even sample of pairs.
        scores: BLEU of the same pairs.
        lowest: the rows with the lowest scores, lowest first.
    """

    counts: Sequence[int]
    edges: Sequence[float]
    lengths: Sequence[int]
    scores: Sequence[float]
    lowest: Sequence[dict[str, Any]]


def read_round(folder: RoundFolder, figures: dict[str, Any]) -> RoundView:
    """Read a round from its decisions, or from its scores where there are none yet."""
    edges = np.linspace(0.0, HIGHEST, BINS + 1)
    counts = np.zeros(BINS, dtype=np.int64)
    lowest: list[tuple[float, int, dict[str, Any]]] = []
    lengths: list[int] = []
    scores: list[float] = []
    step = max(1, -(-figures["rows"] // MOST_POINTS))
    parts = folder.relabeled if folder.relabeled.sealed else folder.scores
    for table in parts.tables():
        counts += np.histogram(np.minimum(table.column("bleu").to_numpy(), HIGHEST), bins=edges)[0]
        order = np.argsort(table.column("bleu").to_numpy(), kind="stable")[:MOST_STRUGGLING]
        for row in table.take(order).to_pylist():
            heapq.heappush(lowest, (-row["bleu"], -row["row"], row))
            if len(lowest) > MOST_STRUGGLING:
                heapq.heappop(lowest)
        sampled = table.filter(np.asarray(table.column("row").to_numpy()) % step == 0)
        lengths += [len(response) for response in sampled.column("response").to_pylist()]
        scores += sampled.column("bleu").to_pylist()
    rows = [row for _, _, row in sorted(lowest, key=lambda entry: (-entry[0], -entry[1]))]
    return RoundView(counts.tolist(), edges.tolist(), lengths, scores, rows)
