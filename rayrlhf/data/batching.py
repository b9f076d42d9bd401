"""Micro-batches under a token budget, and balanced shares for the ranks.

A padded batch costs (samples) x (longest sample) tokens, so samples of similar length belong together. A rank's work is its
number of tokens, not of samples. All functions are pure arithmetic on lengths: every rank and every resumed run computes the
same result.
"""

import heapq
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

SPLIT_TOKENS = 64
"""Fixed cost of a batch in padded tokens: on two cores about the time of as many tokens of a small model."""


def micro_batches(
    lengths: Sequence[int], token_budget: int | None = None, *, max_samples: int | None = None
) -> list[list[int]]:
    """Split samples into batches within the token budget, at the least cost.

    The cost is the padded tokens of all batches plus `SPLIT_TOKENS` per batch. Some optimal split consists of runs of the
    samples sorted by length; dynamic programming over the ends of the runs finds the best one exactly. Without a budget,
    batches have `max_samples` each. The batch that needs the most memory comes first, so a budget that is too large fails at
    once and not after an hour.

    Args:
        lengths: tokens of each sample, each >= 1.
        token_budget: maximum tokens of a batch, padding included; None for no bound. A longer sample gets its own batch.
        max_samples: maximum samples of a batch; None for no bound.

    Returns:
        Indices into `lengths`, each exactly once, sorted by decreasing length, in batches of decreasing padded size. Samples
        of equal length keep their order.

    Raises:
        ValueError: neither bound is given, a bound or a length is below 1.
    """
    _check_lengths(lengths)
    if token_budget is None and max_samples is None:
        raise ValueError("give token_budget, max_samples, or both")
    if (token_budget is not None and token_budget < 1) or (max_samples is not None and max_samples < 1):
        raise ValueError(f"token_budget {token_budget} and max_samples {max_samples} must be >= 1")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    largest = max_samples or len(order)
    if token_budget is None:
        return [order[start : start + largest] for start in range(0, len(order), largest)]
    starts = _cheapest_runs([lengths[index] for index in order], token_budget, largest)
    batches = [order[start:end] for start, end in pairwise([*starts, len(order)])]
    return sorted(batches, key=lambda batch: -len(batch) * lengths[batch[0]])


def _cheapest_runs(lengths: Sequence[int], token_budget: int, max_samples: int) -> list[int]:
    """Return the first index of each run of the cheapest split of decreasing lengths."""
    cost = np.full(len(lengths) + 1, np.iinfo(np.int64).max, dtype=np.int64)
    cost[0] = 0
    came_from = np.zeros(len(lengths) + 1, dtype=np.int64)
    for start, length in enumerate(lengths):
        room = min(max(1, token_budget // length), max_samples, len(lengths) - start)
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
    """Partition samples so that every part has about the same number of tokens.

    This is the largest differencing method (Karmarkar and Karp 1982) for `parts` ways: repeatedly take the two most uneven
    partial solutions and add the large parts of one to the small parts of the other. The sums never differ by more than the
    longest sample, and in practice by far less than with longest-first assignment. The numbers of samples may differ.

    Args:
        lengths: tokens of each sample, each >= 1.
        parts: number of parts, >= 1.

    Returns:
        `parts` lists of indices into `lengths`, each index exactly once and increasing within a part, the part with the most
        tokens first. A part is empty only when there are fewer samples than parts.

    Raises:
        ValueError: `parts` or a length is below 1.
    """
    _check_lengths(lengths)
    if parts < 1:
        raise ValueError(f"parts must be >= 1, not {parts}")
    if parts == 1 or not lengths:
        return [list(range(len(lengths))), *([] for _ in range(parts - 1))]
    # A partial solution: its sums and index lists, sums decreasing. The heap yields the most uneven one; `birth` breaks ties.
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
    """Return the padding share of the batches' tokens, in [0, 1); 0 without tokens.

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
