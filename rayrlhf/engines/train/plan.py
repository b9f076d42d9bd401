"""Assignment of an update's samples to ranks and micro-batches, without communication.

Every rank holds the whole batch and the whole plan, so each computes all shares, micro-batch counts and token counts by itself,
with the same result. Ranks with fewer micro-batches get fillers of weight 0, because collective calls in the backward pass hang
unless every rank makes the same number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rayrlhf.config.algorithm import ParitySection
from rayrlhf.config.train import TrainSection
from rayrlhf.data.batching import balance, micro_batches
from rayrlhf.data.supervised.packing import best_fit_decreasing


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """Samples of each optimizer step.

    Attributes:
        epochs: for each epoch its optimizer steps, each a sequence of rows of the training batch.
    """

    epochs: Sequence[Sequence[Sequence[int]]]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward and backward on one rank.

    A filler (`weight` 0) only makes the rank run as many collectives as the others.
    """

    rows: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Results of an update.

    Metrics are means over the optimizer steps, each weighted by tokens and taken over masks only.

    Attributes:
        metrics: by TRL's names where they exist; equal on every rank.
        grad_norms: norm of the whole gradient before clipping, per optimizer step.
        learning_rates: per optimizer step.
        epochs: epochs begun; fewer than planned after an early stop.
        stopped_early: the KL limit `train.early_stop_kl` ended the update.
        guarded_steps: steps whose gradient the ratio guard set to zero.
        skipped_steps: steps without effect because their loss or gradient had inf or NaN.
        tokens: real tokens in forward and backward passes on this rank.
        padding_share: share of padding in this rank's computation, in [0, 1).
        seconds: time in `forward`, `backward` and `optimizer` on this rank.
        step_metrics: the metrics of each optimizer step.
    """

    metrics: dict[str, float]
    grad_norms: list[float]
    learning_rates: list[float]
    optimizer_steps: int
    epochs: int
    stopped_early: bool
    guarded_steps: int
    skipped_steps: int
    tokens: int
    padding_share: float
    seconds: dict[str, float]
    step_metrics: list[dict[str, float]] = field(default_factory=list)


def split_mini_batch(
    rows: Sequence[int],
    lengths: Sequence[int],
    ranks: int,
    train: TrainSection,
    parity: ParitySection,
    *,
    group_size: int = 1,
    packing: bool = False,
) -> list[list[MicroBatch]]:
    """Split one optimizer step into ranks and micro-batches.

    Args:
        rows: rows of the training batch in the optimizer step.
        lengths: tokens of every row of the training batch.
        train: micro-batch size, or token budget.
        parity: with TRL's per-micro-batch means the split matters, so micro-batches are then consecutive rows.
        group_size: number of consecutive rows that stay together; divides `rows`.
        packing: a micro-batch costs the sum of its lengths, not its padded size.

    Returns:
        The micro-batches of each rank, the same number on every rank.
    """
    if parity.mini_batch_means or parity.no_accumulation:
        shares = [[list(part) for part in _consecutive(share, train)] for share in _runs(rows, ranks)]
    else:
        groups = [rows[start : start + group_size] for start in range(0, len(rows), group_size)]
        cost = _packed_cost if packing else _padded_cost
        own = [cost([lengths[row] for row in group]) for group in groups]
        split = _into_packs if packing else _by_budget
        shares = [
            [[row for index in batch for row in groups[part[index]]] for batch in split([own[index] for index in part], train)]
            for part in balance(own, ranks)
        ]
    count = max(len(share) for share in shares)
    start = min(range(0, len(rows), group_size), key=lambda index: lengths[rows[index]])
    filler = MicroBatch(tuple(rows[start : start + group_size]), weight=0.0)
    return [[MicroBatch(tuple(part)) for part in share] + [filler] * (count - len(share)) for share in shares]


def _runs(rows: Sequence[int], parts: int) -> list[list[int]]:
    return [[int(row) for row in part] for part in np.array_split(np.asarray(rows, dtype=np.int64), parts)]


def _consecutive(share: Sequence[int], train: TrainSection) -> list[Sequence[int]]:
    size = train.micro_batch_size or max(1, len(share))
    return [share[start : start + size] for start in range(0, len(share), size)]


def _padded_cost(lengths: Sequence[int]) -> int:
    return len(lengths) * max(lengths)


def _packed_cost(lengths: Sequence[int]) -> int:
    return sum(lengths)


def _into_packs(lengths: list[int], train: TrainSection) -> list[list[int]]:
    return best_fit_decreasing(lengths, max(train.micro_batch_tokens, *lengths)) if lengths else []


def _by_budget(lengths: list[int], train: TrainSection) -> list[list[int]]:
    if not lengths:
        return []
    if train.micro_batch_size is not None:
        return micro_batches(lengths, max_samples=train.micro_batch_size)
    return micro_batches(lengths, train.micro_batch_tokens)
