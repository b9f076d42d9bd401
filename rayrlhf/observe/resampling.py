"""Bootstrap confidence intervals of means, wins of paired values, and the share of distinct answers.

Intervals are percentile bootstrap intervals (Efron 1979; Efron and Tibshirani 1993, ch. 13): resample the observations with
replacement, and take the quantiles of the resampled means. They assume nothing about the distribution of rewards.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_RESAMPLED_VALUES_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(values: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of [N] values with its bootstrap interval.

    Args:
        values: N >= 1 finite numbers, one per independent unit (per prompt if a prompt has several responses).
        level: nominal probability that the interval covers the true mean.
        resamples: number of bootstrap means.
        seed: equal seeds give equal intervals.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"expected one dimension of at least one finite value, got shape {array.shape}")
    generator = np.random.default_rng(seed)
    chunk = max(1, _RESAMPLED_VALUES_AT_ONCE // array.size)
    means = [
        array[generator.integers(0, array.size, (min(chunk, resamples - start), array.size))].mean(axis=1)
        for start in range(0, resamples, chunk)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(array.mean()), float(low), float(high))


def bootstrap_paired_difference(
    before: ArrayLike, after: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean of `after - before` with its bootstrap interval.

    Pairs are resampled together: the difficulty of a prompt is the same before and after training, and cancels.

    Args:
        after: N values of the same units, in the same order.

    Raises:
        ValueError: the numbers of values differ, or one is not finite.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal numbers of values, got {first.shape} and {second.shape}")
    return bootstrap_mean(second - first, level=level, resamples=resamples, seed=seed)


def wins(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Return 1 per pair whose first value is larger, 0.5 if equal, else 0.

    Args:
        first: [N] numbers; the mean of the result is their win rate.
        second: [N] numbers of the same units.
    """
    return np.asarray(0.5 * (1 + np.sign(np.subtract(first, second, dtype=np.float64))))


def distinct_share(answers: Sequence[Hashable]) -> float:
    """Return the share of distinct answers, in (0, 1]; NaN for no answers.

    Near 0 the policy has collapsed.
    """
    return len(set(answers)) / len(answers) if answers else float("nan")
