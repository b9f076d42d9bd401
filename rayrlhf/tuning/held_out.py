"""Evaluation on held-out samples and pairs, and the length baseline of a reward model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rayrlhf.algorithms.calibration import (
    chance_probability,
    expected_calibration_error,
    margin_histogram,
    pair_accuracy,
    reliability,
)
from rayrlhf.algorithms.losses import bradley_terry_loss
from rayrlhf.data.batching import balance
from rayrlhf.data.records import Float32, TokenScores, TokenSequence
from rayrlhf.data.supervised.datasets import PreferencePair, SupervisedSample
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.supervised_batches import answer_sequence, supervised_sequence
from rayrlhf.models.network_io import OutputName
from rayrlhf.observe.resampling import wins
from rayrlhf.tuning.sample_table import PairTable

LENGTH_METRIC = "evaluation/length_accuracy"
"""Metric name of the length baseline, to be compared with `evaluation/accuracy`."""


@dataclass(frozen=True)
class PreferenceScores:
    """Rewards of held-out pairs.

    Attributes:
        chosen: float32 [N].
        rejected: float32 [N].
        margins: float32 [N], from the data, 0 for pairs without one.
    """

    chosen: Float32
    rejected: Float32
    margins: Float32

    @property
    def differences(self) -> torch.Tensor:
        """Differences chosen - rejected, float32 [N]."""
        return torch.from_numpy(self.chosen - self.rejected)

    @property
    def chance(self) -> float:
        """Probability that random guesses rank as many pairs correctly."""
        return chance_probability(int((self.differences > 0).sum()), len(self.chosen))

    @property
    def mean(self) -> float:
        """Mean reward over all responses."""
        return float(np.concatenate([self.chosen, self.rejected]).mean(dtype=np.float64))

    @property
    def std(self) -> float:
        """Standard deviation of the reward over all responses."""
        return float(np.concatenate([self.chosen, self.rejected]).std(dtype=np.float64))

    def metrics(self) -> dict[str, float]:
        """Values for the metrics sink."""
        chosen, rejected, margins = (torch.from_numpy(part) for part in (self.chosen, self.rejected, self.margins))
        return {
            "evaluation/loss": float(bradley_terry_loss(chosen, rejected, margins).mean()),
            "evaluation/accuracy": pair_accuracy(self.differences),
            "evaluation/calibration_error": expected_calibration_error(self.differences),
            "evaluation/margin": float(self.differences.mean()),
            "evaluation/reward_mean": self.mean,
            "evaluation/reward_spread": self.std,
            "evaluation/chance_probability": self.chance,
        }

    def details(self) -> dict[str, Any]:
        """Reliability by bin and the histogram of margins, as plain values for JSON."""
        bins, histogram = reliability(self.differences), margin_histogram(self.differences)
        return {
            "pairs": len(self.chosen),
            "reliability": {"counts": bins.counts, "confidence": bins.confidence, "accuracy": bins.accuracy},
            "margins": {"edges": histogram.edges, "counts": histogram.counts},
        }


def held_out_loss(engine: TrainEngine, samples: Sequence[SupervisedSample]) -> float:
    """Return the mean of -log p over the target tokens, in nats.

    Every worker takes part and scores a share, or everything if `engine.all_ranks_must_forward`.

    Args:
        samples: the same on every worker.
    """
    scores = shared_scores(engine, [supervised_sequence(sample) for sample in samples], "logprobs")
    total = count = 0.0
    for sample, score in zip(samples, scores, strict=True):
        targets = sample.loss_mask[-len(score) :]
        total -= float(score[targets].sum(dtype=np.float64))
        count += int(targets.sum())
    return total / count


def held_out_rewards(engine: TrainEngine, pairs: Sequence[PreferencePair]) -> PreferenceScores:
    """Return the rewards of both responses of each pair; arguments as `held_out_loss`."""
    sequences = [answer_sequence(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    rewards = np.array([score[-1] for score in shared_scores(engine, sequences, "values")], dtype=np.float32)
    margins = np.array([pair.margin or 0.0 for pair in pairs], dtype=np.float32)
    return PreferenceScores(rewards[::2], rewards[1::2], margins)


def answer_logprobs(engine: TrainEngine, answers: Sequence[SupervisedSample], *, reference: bool = False) -> Float32:
    """Return log-probs summed over the target tokens, float32 [N], in nats.

    `reference` disables the adapters. See `held_out_loss` for the other arguments.
    """
    sequences = [supervised_sequence(answer) for answer in answers]
    scores = shared_scores(engine, sequences, "logprobs", reference=reference)
    sums = [
        float(score[answer.loss_mask[-len(score) :]].sum(dtype=np.float64))
        for answer, score in zip(answers, scores, strict=True)
    ]
    return np.array(sums, dtype=np.float32)


def shared_scores(
    engine: TrainEngine, sequences: Sequence[TokenSequence], outputs: OutputName, *, reference: bool = False
) -> list[Float32]:
    """Return one field of all sequences' scores, on every worker; arguments as `held_out_loss`."""
    grid, ranks = engine.grid, torch.distributed.get_world_size()
    if grid.data_ranks == 1 or engine.all_ranks_must_forward:
        return [_field(score, outputs) for score in engine.score(sequences, frozenset({outputs}), reference=reference)]
    shares = balance([len(sequence.token_ids) for sequence in sequences], grid.data_ranks)
    mine = [sequences[index] for index in shares[grid.data_rank]]
    own = [_field(score, outputs) for score in engine.score(mine, frozenset({outputs}), reference=reference)] if mine else []
    parts: list[list[Float32]] = [[] for _ in range(ranks)]
    torch.distributed.all_gather_object(parts, own)
    first = parts[:: ranks // grid.data_ranks]  # ranks that share rows or weights have the same scores
    by_index = {
        index: score for share, part in zip(shares, first, strict=True) for index, score in zip(share, part, strict=True)
    }
    return [by_index[index] for index in range(len(sequences))]


def _field(score: TokenScores, outputs: OutputName) -> Float32:
    values: Float32 = getattr(score, outputs)
    return values


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
        return (
            f"length rule: preferring the {self.prefers} answer is right on {self.accuracy:.1%} of {self.pairs} held-out pairs"
        )


def length_baseline(train: PairTable, held_out: PairTable) -> LengthBaseline:
    """Fit and measure the length rule; lengths are in tokens."""
    longer = _longer_wins(train) >= 0.5
    accuracy = _longer_wins(held_out)
    return LengthBaseline("longer" if longer else "shorter", accuracy if longer else 1 - accuracy, len(held_out))


def _longer_wins(table: PairTable) -> float:
    """Return the share of pairs whose chosen response is longer; equal lengths count as half."""
    lengths = np.diff(table.answers.offsets)
    return float(wins(lengths[::2], lengths[1::2]).mean())
