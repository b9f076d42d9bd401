"""Accuracy, calibration and margins of a reward model on held-out pairs.

A model trained with the Bradley-Terry loss claims that the answer it prefers wins with probability sigmoid(|difference|), which
is between one half and one. It is calibrated if, among pairs with equal claims, that share is correct.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reliability:
    """Claimed against actual accuracy, in bins of equal width over [1/2, 1].

    A bin without pairs is 0 in all lists.

    Attributes:
        counts: pairs in each bin.
        confidence: mean claimed probability in each.
        accuracy: share of correct pairs in each; equal rewards count as half correct.
    """

    counts: list[int]
    confidence: list[float]
    accuracy: list[float]

    @property
    def expected_error(self) -> float:
        """Return the ECE: the mean of |accuracy - confidence| over pairs.

        0 is best, 1 worst (Naeini et al. 2015; Guo et al. 2017).
        """
        total = sum(self.counts)
        parts = zip(self.counts, self.confidence, self.accuracy, strict=True)
        return sum(count * abs(right - claimed) for count, claimed, right in parts) / total


@dataclass(frozen=True, slots=True)
class MarginHistogram:
    """Histogram of the reward differences of held-out pairs.

    Attributes:
        edges: n + 1 ascending edges, symmetric around 0; a bin includes its lower edge, and the last one its upper edge too.
        counts: number of pairs in each of the n bins.
    """

    edges: list[float]
    counts: list[int]


def pair_accuracy(differences: Tensor) -> float:
    """Return the share of pairs whose better answer has the higher reward.

    Equal rewards count as wrong, as in TRL's `accuracy`.

    Args:
        differences: float [N], chosen - rejected, N >= 1.

    Raises:
        ValueError: no pairs, or a difference that is not finite.
    """
    return (_checked(differences) > 0).double().mean().item()


def reliability(differences: Tensor, bins: int = 10) -> Reliability:
    """Bin pairs by the claimed probability and count the correct ones.

    Args:
        differences: float [N], chosen - rejected, N >= 1.
        bins: number of bins, >= 1.

    Raises:
        ValueError: no pairs, or a difference that is not finite.
    """
    differences = _checked(differences)
    claimed = differences.abs().sigmoid()
    right = 0.5 * (1 + differences.sign())
    index = ((2 * claimed - 1) * bins).long().clamp(max=bins - 1)
    counts = torch.bincount(index, minlength=bins)
    at_least_one = counts.clamp(min=1)
    confidence = torch.bincount(index, weights=claimed, minlength=bins) / at_least_one
    accuracy = torch.bincount(index, weights=right, minlength=bins) / at_least_one
    return Reliability(counts.tolist(), confidence.tolist(), accuracy.tolist())


def expected_calibration_error(differences: Tensor, bins: int = 10) -> float:
    """Return the ECE of sigmoid(difference), in [0, 1]; see `reliability` for arguments and errors."""
    return reliability(differences, bins).expected_error


def margin_histogram(differences: Tensor, bins: int = 20) -> MarginHistogram:
    """Count differences in bins of equal width up to the largest of them.

    Args:
        differences: float [N], chosen - rejected, N >= 1.
        bins: number of bins, even, so that 0 is an edge and no bin mixes correct and wrong pairs.

    Raises:
        ValueError: no pairs, a difference that is not finite, or an odd number of bins.
    """
    if bins < 2 or bins % 2:
        raise ValueError(f"bins must be even, not {bins}, so that 0 is an edge")
    differences = _checked(differences)
    reach = differences.abs().max().item() or 1.0
    half = bins // 2
    index = ((differences / reach) * half).floor().long().clamp(-half, half - 1) + half
    # A negative difference that the division rounds to 0 still belongs to a wrong pair.
    index = torch.where(differences < 0, index.clamp(max=half - 1), index)
    edges = [reach * ((number - half) / half) for number in range(bins + 1)]
    return MarginHistogram(edges, torch.bincount(index, minlength=bins).tolist())


def chance_probability(correct: int, pairs: int) -> float:
    """Return the p-value of the one-sided exact binomial test against one half.

    Args:
        correct: number of pairs that the model ranked correctly.
        pairs: number of all pairs.

    Returns:
        In [0, 1]. Small means better than chance; 1 where there are no pairs.

    Raises:
        ValueError: `correct` is not in [0, pairs].
    """
    if not 0 <= correct <= pairs:
        raise ValueError(f"correct {correct} is not between 0 and pairs {pairs}")
    heads = torch.arange(correct, pairs + 1, dtype=torch.float64)
    log_choose = math.lgamma(pairs + 1) - torch.lgamma(heads + 1) - torch.lgamma(pairs - heads + 1)
    return min(1.0, torch.logsumexp(log_choose - pairs * math.log(2), 0).exp().item())


def _checked(differences: Tensor) -> Tensor:
    differences = differences.detach().double().flatten()
    if not len(differences):
        raise ValueError("no pairs, expected at least one")
    if not differences.isfinite().all():
        raise ValueError(f"{int((~differences.isfinite()).sum())} of {len(differences)} differences of rewards are not finite")
    return differences
