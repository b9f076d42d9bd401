"""Path through the nearest-neighbor graph that visits each document once.

After Shi et al. 2023, "In-Context Pretraining: Language Modeling Beyond Document Boundaries": start at the unvisited document
with the fewest neighbors, the hardest to reach later; continue with its nearest unvisited neighbor; where there is none,
start again. Near-duplicates are removed first, because next to its copy a text teaches only copying. The path is then cut into
contexts of exactly the configured length, so every token is in one context; the last may be shorter.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rayrlhf.data.words import words_of
from rayrlhf.demonstrations.example import LeakRules, resemblance


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


def are_near_duplicates(first: str, second: str, rules: LeakRules) -> bool:
    """Return True for near-duplicates; equal words count at any length."""
    words, others = words_of(first), words_of(second)
    if words == others:
        return True
    return min(len(words), len(others)) >= rules.words and resemblance(first, second) >= rules.resemblance


def duplicates_to_drop(copies: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Return the documents to drop, each with the earlier document that is kept.

    Only neighbors need to be compared, because near-duplicates are each other's nearest.

    Args:
        copies: pairs of near-duplicates, in any order and direction.
    """
    removed: dict[int, int] = {}
    for earlier, later in sorted({(min(pair), max(pair)) for pair in copies if pair[0] != pair[1]}):
        if earlier not in removed and later not in removed:
            removed[later] = earlier
    return removed


def related_order(neighbors: Sequence[Sequence[int]], without: frozenset[int] = frozenset()) -> list[int]:
    """Return each document once, along the greedy path.

    Args:
        neighbors: positions of each document's neighbors, nearest first. Edges are undirected; a document's own list precedes
            the lists that contain it.
    """
    edges = _both_ways(neighbors, without)
    remaining = set(edges)
    order: list[int] = []
    for start in sorted(edges, key=lambda document: (len(edges[document]), document)):
        here: int | None = start
        while here is not None and here in remaining:
            remaining.remove(here)
            order.append(here)
            here = next((document for document in edges[here] if document in remaining), None)
    return order


def random_order(documents: int, seed: int, without: frozenset[int] = frozenset()) -> list[int]:
    """Return each document once in random order, the baseline of `related_order`."""
    order = [document for document in range(documents) if document not in without]
    random.Random(seed).shuffle(order)
    return order


def cut(order: Sequence[int], lengths: Sequence[int], context: int) -> list[list[Piece]]:
    """Return contexts filled with the documents in order.

    Args:
        order: documents in order.
        lengths: tokens per document; an empty one gives no piece.
        context: tokens per context.

    Raises:
        ValueError: context below 1.
    """
    if context < 1:
        raise ValueError(f"context {context}: expected at least 1 token")
    contexts: list[list[Piece]] = []
    free = 0
    for document in order:
        start = 0
        while start < lengths[document]:
            if free == 0:
                contexts.append([])
                free = context
            taken = min(free, lengths[document] - start)
            contexts[-1].append(Piece(document, start, start + taken))
            start, free = start + taken, free - taken
    return contexts


def _both_ways(neighbors: Sequence[Sequence[int]], without: frozenset[int]) -> dict[int, list[int]]:
    edges: dict[int, dict[int, None]] = {
        document: {near: None for near in listed if near != document and near not in without}
        for document, listed in enumerate(neighbors)
        if document not in without
    }
    for document, listed in [(document, list(near)) for document, near in edges.items()]:
        for near in listed:
            edges[near].setdefault(document)
    return {document: list(near) for document, near in edges.items()}
