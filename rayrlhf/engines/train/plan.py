"""Assignment of an update's samples to ranks and micro-batches, without communication.

Every rank holds the whole batch and the whole plan, so each computes all shares, micro-batch counts and token counts by itself,
with the same result. Ranks with fewer micro-batches get fillers of weight 0, because collective calls in the backward pass hang
unless every rank makes the same number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayrlhf.config.algorithm import ParitySection
from rayrlhf.config.train import TrainSection
from rayrlhf.data.batching import balance, micro_batches
from rayrlhf.data.prefix_tree import Tokens, in_prefix_order
from rayrlhf.data.supervised.packing import best_fit_decreasing
from rayrlhf.observe.metric_names import COMPUTED_TOKENS, SHARED_FRACTION


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

    A filler (`weight` 0) only makes the rank run as many collectives as the others. `shared` computes common beginnings once.
    """

    rows: tuple[int, ...]
    weight: float = 1.0
    shared: bool = False


class TrainedRows(NamedTuple):
    """One micro-batch as it was computed on one rank; fillers have none.

    Attributes:
        mini_batch: its number in the update, counted over all epochs from 0.
        rows: of the training batch, [N].
        fingerprints: of the rows in the forward pass (`row_fingerprints`), uint64 [N].
        denominators: name of a count -> number that its losses were divided by.
        sums: name of a count -> coefficient times the sum of the losses divided by it.
        sizes: the same with the absolute value of each loss's sum, which may cancel out in `sums`.
        loss: the loss whose gradient was taken, without the load-balancing loss of experts.
    """

    mini_batch: int
    rows: tuple[int, ...]
    fingerprints: NDArray[np.uint64]
    denominators: dict[str, float]
    sums: dict[str, float]
    sizes: dict[str, float]
    loss: float


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
        tokens: real tokens in forward and backward passes on this rank, or of whole rows where ranks share them.
        computed: tokens that this rank computed, with padding, with shared prefixes once, and in its columns of shared rows.
        shared_fraction: share of the tokens that did not need to be computed, in [0, 1).
        padding_share: share of padding in this rank's computation, in [0, 1).
        seconds: time in `forward`, `backward` and `optimizer` on this rank.
        step_metrics: the metrics of each optimizer step.
        trained: micro-batches of this rank, for the witness of the driver.
        data_rank: number of this rank's share of the samples, see `Grid`.
        steps_before: optimizer steps that the engine had taken before the update.
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
    computed: int
    shared_fraction: float
    padding_share: float
    seconds: dict[str, float]
    step_metrics: list[dict[str, float]] = field(default_factory=list)
    trained: list[TrainedRows] = field(default_factory=list)
    data_rank: int = 0
    steps_before: int = 0

    @property
    def token_metrics(self) -> dict[str, float]:
        """Computed tokens and the share that was saved, by metric name."""
        return {COMPUTED_TOKENS: float(self.computed), SHARED_FRACTION: self.shared_fraction}


def split_mini_batch(
    rows: Sequence[int],
    lengths: Sequence[int],
    ranks: int,
    train: TrainSection,
    parity: ParitySection,
    *,
    group_size: int = 1,
    packing: bool = False,
    tokens: Sequence[Tokens] | None = None,
) -> list[list[MicroBatch]]:
    """Split one optimizer step into ranks and micro-batches.

    Args:
        rows: rows of the training batch in the optimizer step.
        lengths: tokens of every row of the training batch.
        train: micro-batch size, or token budget.
        parity: with TRL's per-micro-batch means the split matters, so micro-batches are then consecutive rows.
        group_size: number of consecutive rows that stay together; divides `rows`.
        packing: a micro-batch costs the sum of its lengths, not its padded size.
        tokens: token ids of every row, if common beginnings may be computed once; where that pays, a micro-batch costs its
            distinct tokens, and rows with a common beginning stay together.

    Returns:
        The micro-batches of each rank, the same number on every rank.
    """
    consecutive = parity.mini_batch_means or parity.no_accumulation
    order = None if tokens is None or consecutive else in_prefix_order([tokens[row] for row in rows], group_size)
    shared = order is not None and order.pays
    if order is not None and shared:
        size = train.micro_batch_size
        limits = (train.micro_batch_tokens, None) if size is None else (None, size * group_size)
        batches = [order.micro_batches(part, *limits) for part in order.parts(ranks)]
        shares = [[[rows[index] for index in batch] for batch in part] for part in batches]
    elif consecutive:
        shares = [_consecutive(share, train) for share in np.array_split(np.asarray(rows, np.int64), ranks)]
    else:
        groups = [rows[start : start + group_size] for start in range(0, len(rows), group_size)]
        sizes = [[lengths[row] for row in group] for group in groups]
        own = [sum(part) if packing else len(part) * max(part) for part in sizes]
        split = _into_packs if packing else _by_budget
        shares = [
            [[row for index in batch for row in groups[part[index]]] for batch in split([own[index] for index in part], train)]
            for part in balance(own, ranks)
        ]
    count = max(len(share) for share in shares)
    start = min(range(0, len(rows), group_size), key=lambda index: lengths[rows[index]])
    filler = MicroBatch(tuple(rows[start : start + group_size]), weight=0.0)
    return [[MicroBatch(tuple(part), shared=shared) for part in share] + [filler] * (count - len(share)) for share in shares]


def _consecutive(share: NDArray[np.int64], train: TrainSection) -> list[list[int]]:
    size = train.micro_batch_size or max(1, len(share))
    return [share[start : start + size].tolist() for start in range(0, len(share), size)]


def _into_packs(lengths: list[int], train: TrainSection) -> list[list[int]]:
    return best_fit_decreasing(lengths, max(train.micro_batch_tokens, *lengths)) if lengths else []


def _by_budget(lengths: list[int], train: TrainSection) -> list[list[int]]:
    if not lengths:
        return []
    if train.micro_batch_size is not None:
        return micro_batches(lengths, max_samples=train.micro_batch_size)
    return micro_batches(lengths, train.micro_batch_tokens)
