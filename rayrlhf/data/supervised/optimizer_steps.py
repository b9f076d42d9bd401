"""Samples of each optimizer step of SFT or reward modeling, by (seed, epoch, step).

There is no cursor to save: a run that resumes at step n computes batch n, with the same samples as an uninterrupted run,
independent of the number of workers. Batches do not cross epochs, so an epoch contains every sample once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rayrlhf.data.prompt_sampler import permutation


@dataclass(frozen=True, slots=True)
class BatchSize:
    """Size of an optimizer step over all workers, in samples or in tokens.

    Attributes:
        samples: samples per step.
        tokens: maximum tokens per step; a longer sample gets a step of its own.
        fewest: minimum samples per step, one for each worker, even if they exceed `tokens`; a shorter end of an epoch is added
            to the step before it.
    """

    samples: int | None = None
    tokens: int | None = None
    fewest: int = 1

    def __post_init__(self) -> None:
        if (self.samples is None) == (self.tokens is None):
            raise ValueError("give samples or tokens")
        if self.fewest < 1 or (self.tokens is not None and self.tokens < 1):
            raise ValueError(f"tokens {self.tokens} and fewest {self.fewest} must be >= 1")
        if self.samples is not None and self.samples < self.fewest:
            raise ValueError(f"samples {self.samples} must be >= fewest {self.fewest}")


def epoch_batches(lengths: Sequence[int], size: BatchSize, *, seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
    """Return the optimizer steps of one pass over the samples.

    Args:
        lengths: tokens of each sample; of both responses for a pair.
        size: of a step.
        epoch: 0, 1, ...
        shuffle: a new order each epoch; False keeps the order of the samples.

    Returns:
        Indices into `lengths`, each exactly once. Only an epoch smaller than `size.fewest` has a smaller step.

    Raises:
        ValueError: there are no samples.
    """
    if not lengths:
        raise ValueError("there are no samples to make batches of")
    order = permutation(len(lengths), seed, epoch) if shuffle else list(range(len(lengths)))
    if size.samples is not None:
        batches = [order[start : start + size.samples] for start in range(0, len(order), size.samples)]
    else:
        batches = _by_tokens(order, lengths, size.tokens or 1, size.fewest)
    if len(batches) > 1 and len(batches[-1]) < size.fewest:
        end = batches.pop()
        batches[-1] += end
    return batches


class BatchPlan:
    """All optimizer steps of a run, by number."""

    def __init__(
        self,
        lengths: Sequence[int],
        size: BatchSize,
        *,
        seed: int,
        epochs: int = 1,
        steps: int | None = None,
        shuffle: bool = True,
    ) -> None:
        """Plan a run.

        Args:
            lengths: tokens of each sample; of both responses for a pair.
            size: of a step.
            steps: length of the run in steps, instead of `epochs`.
            shuffle: a new order each epoch.

        Raises:
            ValueError: there are no samples.
        """
        self._lengths, self._size, self._seed, self._shuffle = lengths, size, seed, shuffle
        self._starts = [0]
        self._epoch: tuple[int, list[list[int]]] = (0, self._batches(0))
        if steps is None:
            while len(self._starts) <= epochs:
                self._extend()
        self.total_steps = self._starts[epochs] if steps is None else steps
        """Optimizer steps of the run."""

    def batch(self, step: int) -> list[int]:
        """Return the samples of a step, counted from 0 over the whole run, as indices.

        Raises:
            IndexError: the run has no such step.
        """
        epoch = self.epoch_of(step)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        return list(self._epoch[1][step - self._starts[epoch]])

    def epoch_of(self, step: int) -> int:
        """Return the epoch that a step belongs to.

        Raises:
            IndexError: the run has no such step.
        """
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} of a run of {self.total_steps} steps")
        while self._starts[-1] <= step:
            self._extend()
        return next(epoch for epoch in range(len(self._starts) - 1) if step < self._starts[epoch + 1])

    def _extend(self) -> None:
        """Compute the end of the next epoch.

        With a fixed number of samples per step, every epoch has the same number of steps; otherwise they are counted.
        """
        epoch = len(self._starts) - 1
        constant = self._size.samples is not None and epoch > 0
        count = self._starts[1] if constant else len(self._batches(epoch))
        self._starts.append(self._starts[-1] + count)

    def _batches(self, epoch: int) -> list[list[int]]:
        return epoch_batches(self._lengths, self._size, seed=self._seed, epoch=epoch, shuffle=self._shuffle)


def _by_tokens(order: Sequence[int], lengths: Sequence[int], max_tokens: int, fewest: int) -> list[list[int]]:
    """Fill steps in the given order, each up to `max_tokens`."""
    batches: list[list[int]] = []
    room = 0
    for index in order:
        full = lengths[index] > room and (not batches or len(batches[-1]) >= fewest)
        if full:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= lengths[index]
    return batches
