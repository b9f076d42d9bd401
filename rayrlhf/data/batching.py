"""Which samples go together: micro-batches under a token budget, and shares of equal work for the ranks.

A padded batch costs (samples) x (longest sample) tokens, so samples of like length belong together, and a rank's work is its
number of tokens, not of samples. Everything here is pure arithmetic on lengths and depends on nothing but its arguments: every
rank computes the same answer and a resumed run computes it again.
"""

import heapq
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

SPLIT_TOKENS = 64
"""What starting one more batch costs, in padded tokens: on two cores about the time of as many tokens of a small model."""


def micro_batches(
    lengths: Sequence[int], token_budget: int | None = None, *, max_samples: int | None = None
) -> list[list[int]]:
    """Split samples into batches whose padded size stays within the budget, at the least cost.

    The cost is the padded tokens of all batches and `SPLIT_TOKENS` for each batch. Some cheapest split has batches that are
    runs of the samples in order of length, and the cheapest of those is found exactly, by dynamic programming over where a run
    may end. Without a budget nothing is weighed: batches of `max_samples`. The batch that needs the most memory comes first, so
    a budget that is too large fails at once and not after an hour.

    Args:
        lengths: tokens of each sample, each >= 1.
        token_budget: most tokens of a batch, padding included; no bound when not given. A longer sample gets its own batch.
        max_samples: most samples of a batch; no bound when not given.

    Returns:
        Indices into `lengths`, each exactly once, by falling length in batches of falling padded size; samples of equal length
        keep their order.

    Raises:
        ValueError: neither bound is given, a bound or a length is below 1.
    """
    _check_lengths(lengths)
    if token_budget is None and max_samples is None:
        raise ValueError("give token_budget, max_samples, or both")
    if (token_budget is not None and token_budget < 1) or (max_samples is not None and max_samples < 1):
        raise ValueError(f"token_budget {token_budget} and max_samples {max_samples} must be >= 1")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    most = max_samples or len(order)
    if token_budget is None:
        return [order[start : start + most] for start in range(0, len(order), most)]
    starts = _cheapest_runs([lengths[index] for index in order], token_budget, most)
    batches = [order[start:end] for start, end in pairwise([*starts, len(order)])]
    return sorted(batches, key=lambda batch: -len(batch) * lengths[batch[0]])


def _cheapest_runs(lengths: Sequence[int], token_budget: int, most: int) -> list[int]:
    """Where the runs of the cheapest split begin; lengths fall."""
    cost = np.full(len(lengths) + 1, np.iinfo(np.int64).max, dtype=np.int64)
    cost[0] = 0
    came_from = np.zeros(len(lengths) + 1, dtype=np.int64)
    for start, length in enumerate(lengths):
        room = min(max(1, token_budget // length), most, len(lengths) - start)
        ends = slice(start + 1, start + room + 1)
        new = cost[start] + SPLIT_TOKENS + length * np.arange(1, room + 1, dtype=np.int64)
        better = new < cost[ends]
        cost[ends][better] = new[better]
        came_from[ends][better] = start
    starts, end = [], len(lengths)
    while end:
        end = int(came_from[end])
        starts.append(end)
    return starts[::-1]


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Share samples out so that every part has about the same number of tokens; numbers of samples may differ.

    This is the largest differencing method (Karmarkar and Karp 1982) for `parts` ways: repeatedly take the two most uneven
    partial solutions and lay the large parts of one on the small parts of the other. The sums never differ by more than the
    longest sample, in practice by far less than with longest-first assignment.

    Args:
        lengths: tokens of each sample, each >= 1.
        parts: number of parts, >= 1.

    Returns:
        `parts` lists of indices into `lengths`, each index exactly once and rising within a part, the part with most tokens
        first. A part is empty only when there are fewer samples than parts.

    Raises:
        ValueError: `parts` or a length is below 1.
    """
    _check_lengths(lengths)
    if parts < 1:
        raise ValueError(f"parts must be >= 1, not {parts}")
    if parts == 1 or not lengths:
        return [list(range(len(lengths))), *([] for _ in range(parts - 1))]
    # A partial solution: its sums and index lists by falling sum. The heap gives the most uneven one; `birth` breaks ties.
    heap: list[tuple[int, int, list[int], list[list[int]]]] = []
    for birth, length in enumerate(lengths):
        sums = [int(length)] + [0] * (parts - 1)
        members: list[list[int]] = [[birth]] + [[] for _ in range(parts - 1)]
        heap.append((sums[-1] - sums[0], birth, sums, members))
    heapq.heapify(heap)
    for birth in range(len(lengths), 2 * len(lengths) - 1):
        _, _, sums_a, members_a = heapq.heappop(heap)
        _, _, sums_b, members_b = heapq.heappop(heap)
        merged = sorted(
            ((a + b, rank) for rank, (a, b) in enumerate(zip(sums_a, reversed(sums_b), strict=True))),
            key=lambda pair: (-pair[0], pair[1]),
        )
        sums = [total for total, _ in merged]
        members = [members_a[rank] + members_b[parts - 1 - rank] for _, rank in merged]
        heapq.heappush(heap, (sums[-1] - sums[0], birth, sums, members))
    return [sorted(part) for part in heap[0][3]]


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Return the share of the batches' tokens that is padding, in [0, 1); 0 when there are no tokens.

    Args:
        lengths: tokens of each sample.
        batches: indices into `lengths`, each batch padded to its own longest sample.
    """
    real = sum(lengths[index] for batch in batches for index in batch)
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches if batch)
    return 1.0 - real / padded if padded else 0.0


def _check_lengths(lengths: Sequence[int]) -> None:
    for index, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"sample {index} has length {length}, expected >= 1")
