"""Length baseline of a reward model: always prefer the shorter, or the longer, answer."""

from dataclasses import dataclass

import numpy as np

from rayrlhf.tuning.sample_table import PairTable

METRIC = "evaluation/length_accuracy"
"""Metric name, to be compared with `evaluation/accuracy`."""


@dataclass(frozen=True, slots=True)
class LengthBaseline:
    """Length rule fitted on the training pairs and measured on the held-out pairs.

    Attributes:
        prefers: `shorter` or `longer`, the one that is right on more training pairs.
        accuracy: share of held-out pairs it ranks correctly; equal lengths count as half.
        pairs: number of held-out pairs.
    """

    prefers: str
    accuracy: float
    pairs: int

    def line(self) -> str:
        """Return a description in one line."""
        return f"to beat: preferring the {self.prefers} answer gets {self.accuracy:.1%} of {self.pairs} held-out pairs right"


def length_baseline(train: PairTable, held_out: PairTable) -> LengthBaseline:
    """Fit and measure the length rule; lengths are in tokens."""
    longer = _longer_wins(train) >= 0.5
    accuracy = _longer_wins(held_out)
    return LengthBaseline("longer" if longer else "shorter", accuracy if longer else 1 - accuracy, len(held_out))


def _longer_wins(table: PairTable) -> float:
    """Return the share of pairs whose chosen response is longer; equal lengths count as half."""
    lengths = np.diff(table.answers.offsets)
    return float(np.mean(0.5 * (1 + np.sign(lengths[::2] - lengths[1::2]))))
