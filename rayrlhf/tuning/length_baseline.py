"""Length baseline of a reward model: always prefer the shorter, or the longer, answer."""

from dataclasses import dataclass

import numpy as np

from rayrlhf.tuning.sample_table import PairTable

METRIC = "evaluation/length_accuracy"
"""Metric name, to be compared with `evaluation/accuracy`."""


@dataclass(frozen=True, slots=True)
class LengthBaseline:
    """The rule as the training pairs chose it, measured on the held-out ones.

    Attributes:
        prefers: `shorter` or `longer`, whichever is right on more of the training pairs.
        accuracy: share of held-out pairs it gets right; equal lengths count as half.
        pairs: how many pairs are held out.
    """

    prefers: str
    accuracy: float
    pairs: int

    def line(self) -> str:
        """Return it for people."""
        return f"to beat: preferring the {self.prefers} answer gets {self.accuracy:.1%} of {self.pairs} held-out pairs right"


def length_baseline(train: PairTable, held_out: PairTable) -> LengthBaseline:
    """Return the rule's accuracy; lengths are in tokens."""
    longer = _longer_wins(train) >= 0.5
    accuracy = _longer_wins(held_out)
    return LengthBaseline("longer" if longer else "shorter", accuracy if longer else 1 - accuracy, len(held_out))


def _longer_wins(table: PairTable) -> float:
    """Share of pairs whose better answer is the longer one, equals as half."""
    lengths = np.diff(table.answers.offsets)
    return float(np.mean(0.5 * (1 + np.sign(lengths[::2] - lengths[1::2]))))
