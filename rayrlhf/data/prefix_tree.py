"""Prefix trees of token sequences: common beginnings are stored once.

Groups share their prompt, agents their history, preference pairs their prompt, few-shot prompts their demonstrations. Hidden
states of a causal model depend on earlier tokens only, so a beginning that several sequences have in common needs to be
computed once. All functions are pure and read only token ids: every rank and every resumed run computes the same result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

LEAST_SHARED = 0.03
"""Share of a batch's tokens from which sharing pays; below it the layout without sharing is used."""

LEAST_TOKENS = 16
"""Saved tokens for each branch from which sharing pays: a branch has attention of its own, which takes as long as 16 tokens in
a model with three layers of 128. Sums of 10 tokens, which share 2 or 3, were trained on 2.5 times as slowly with sharing."""

LARGEST_MASK = 16 * 2**20
"""Entries of an attention mask (1 byte each) up to which sharing pays: a branch has one of its length x that of its sample."""

Tokens = NDArray[np.int32]
Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Segments of a prefix tree, end to end in one row.

    Parents precede their children.

    Attributes:
        token_ids: int64 [U], the distinct tokens.
        lengths: tokens of each segment, at least 1.
        parents: number of the segment that each one continues; -1 at the start of a sequence.
        places: for each sequence the index in the row of each of its tokens, int64 [its length].
    """

    token_ids: NDArray[np.int64]
    lengths: list[int]
    parents: list[int]
    places: list[Places]


def prefix_tree(sequences: Sequence[Tokens]) -> PrefixTree:
    """Build the tree of token sequences, in any order and with repetitions."""
    order = sorted(range(len(sequences)), key=lambda index: _key(sequences[index]))
    ordered = [sequences[index] for index in order]
    shared = _shared_with_previous(ordered)
    lengths: list[int] = []
    parents: list[int] = []
    tokens: list[Tokens] = []
    nowhere = np.zeros(0, dtype=np.int64)
    places: list[Places] = [nowhere] * len(sequences)
    size = 0
    # Ranges of sequences whose first `depth` tokens are the same, at `path`, and end with the segment `parent`.
    waiting: list[tuple[int, int, int, int, Places]] = [(0, len(ordered), 0, -1, nowhere)]
    while waiting:
        first, end, depth, parent, path = waiting.pop()
        common = len(ordered[first]) if end == first + 1 else int(shared[first + 1 : end].min())
        if common > depth:
            tokens.append(ordered[first][depth:common])
            lengths.append(common - depth)
            parents.append(parent)
            parent, path = len(lengths) - 1, np.concatenate([path, np.arange(size, size + common - depth)])
            size += common - depth
        while first < end and len(ordered[first]) == common:
            places[order[first]] = path
            first += 1
        starts = [first, *(first + 1 + np.flatnonzero(shared[first + 1 : end] == common)).tolist()] if first < end else []
        waiting += [(start, stop, common, parent, path) for start, stop in reversed(list(pairwise([*starts, end])))]
    flat = np.concatenate(tokens).astype(np.int64) if tokens else np.zeros(0, dtype=np.int64)
    return PrefixTree(flat, lengths, parents, places)


@dataclass(frozen=True, slots=True)
class PrefixOrder:
    """Groups of rows ordered by their tokens, so that common beginnings are adjacent.

    Attributes:
        groups: rows of each group.
        distinct: tokens of each group's own prefix tree.
        shared: tokens that the first row of each group has in common with that of the previous group; 0 for the first.
        tokens: tokens of all rows.
        branches: rows that have a prefix in common with the row before them.
        largest_mask: entries of the largest attention mask that a run of the groups may need.
    """

    groups: list[list[int]]
    distinct: list[int]
    shared: list[int]
    tokens: int
    branches: int
    largest_mask: int

    @property
    def pays(self) -> bool:
        """True if sharing saves time.

        It must save `LEAST_SHARED` of the tokens and `LEAST_TOKENS` per branch, with masks up to `LARGEST_MASK`.
        """
        saved = self.tokens - sum(self.distinct) + sum(self.shared)
        least = max(LEAST_SHARED * self.tokens, LEAST_TOKENS * self.branches)
        return saved >= least and self.largest_mask <= LARGEST_MASK

    def parts(self, count: int) -> list[range]:
        """Return runs of groups with the smallest largest number of distinct tokens.

        They may be empty. A run computes all tokens of its first row, also those that the previous run has in common with it.
        """
        low, high = max(self.distinct, default=0), sum(self.distinct) - sum(self.shared)
        while low < high:
            middle = (low + high) // 2
            fits = self._ends(count, middle)[-1] == len(self.groups)
            low, high = (low, middle) if fits else (middle + 1, high)
        return [range(start, end) for start, end in pairwise([0, *self._ends(count, high)])]

    def _ends(self, count: int, most: int) -> list[int]:
        """Return the ends of the longest runs with at most `most` distinct tokens each."""
        totals = np.cumsum([0, *(own - common for own, common in zip(self.distinct, self.shared, strict=True))])
        ends: list[int] = []
        start = 0
        for _ in range(count):
            if start < len(self.groups):
                start = int(np.searchsorted(totals, totals[start] + most - self.shared[start], side="right")) - 1
            ends.append(start)
        return ends

    def row_parts(self, count: int) -> list[list[int]]:
        """Return the rows of each of `parts`, in increasing order."""
        return [sorted(row for number in part for row in self.groups[number]) for part in self.parts(count)]

    def micro_batches(self, part: range, token_budget: int | None, max_rows: int | None = None) -> list[list[int]]:
        """Cut a run of groups into batches of rows within a budget of distinct tokens.

        The largest batch comes first, so a budget that is too large fails at once.

        Args:
            part: numbers of groups.
            token_budget: maximum distinct tokens of a batch; None for no bound. A larger group is its own batch.
            max_rows: maximum rows of a batch; None for no bound.
        """
        batches: list[tuple[int, list[int]]] = []
        for number in part:
            group, added = self.groups[number], self.distinct[number] - self.shared[number]
            size, rows = batches[-1] if batches else (0, [])
            full = token_budget is not None and size + added > token_budget
            if not rows or full or (max_rows is not None and len(rows) + len(group) > max_rows):
                batches.append((self.distinct[number], list(group)))
            else:
                batches[-1] = (size + added, rows + group)
        return [rows for _, rows in sorted(batches, key=lambda batch: -batch[0])]


def in_prefix_order(sequences: Sequence[Tokens], group_size: int = 1) -> PrefixOrder:
    """Order groups of `group_size` consecutive rows by the tokens of their first row."""
    groups = [list(range(start, start + group_size)) for start in range(0, len(sequences), group_size)]
    groups.sort(key=lambda group: _key(sequences[group[0]]))
    distinct, masks, branches = [], [], 0
    for group in groups:
        members = sorted((sequences[row] for row in group), key=_key)
        common = _shared_with_previous(members)
        distinct.append(sum(map(len, members)) - int(common.sum()))
        masks.append(_largest_mask(members, common))
        branches += int(np.count_nonzero(common))
    first = [sequences[group[0]] for group in groups]
    shared = _shared_with_previous(first)
    tokens, branches = sum(map(len, sequences)), branches + int(np.count_nonzero(shared))
    return PrefixOrder(groups, distinct, shared.tolist(), tokens, branches, max([*masks, _largest_mask(first, shared)]))


def _largest_mask(sequences: Sequence[Tokens], shared: NDArray[np.int64]) -> int:
    """Return the entries of the largest mask of neighbors that branch off each other."""
    lengths = np.array([len(tokens) for tokens in sequences], dtype=np.int64)
    longer, common = np.maximum(lengths[1:], lengths[:-1]), shared[1:]
    return int(((longer - common) * longer)[common > 0].max(initial=0))


def _key(tokens: Tokens) -> bytes:
    """Return bytes that sort as the tokens do."""
    return tokens.astype(">i4").tobytes()


def _shared_with_previous(sequences: Sequence[Tokens]) -> NDArray[np.int64]:
    """Return the length of each sequence's common beginning with the previous one, int64 [B].

    The first has 0.
    """
    shared = np.zeros(len(sequences), dtype=np.int64)
    for index in range(1, len(sequences)):
        before, tokens = sequences[index - 1], sequences[index]
        size = min(len(before), len(tokens))
        differ = before[:size] != tokens[:size]
        shared[index] = differ.argmax() if differ.any() else size
    return shared
