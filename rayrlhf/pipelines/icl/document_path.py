"""Related documents one after another: a path through the nearest-neighbour graph that visits each document once.

After Shi et al. 2023, "In-Context Pretraining: Language Modeling Beyond Document Boundaries": begin at the unvisited document
with the fewest neighbours, the hardest to reach later; go on to its nearest unvisited neighbour; where there is none,
begin again. Near-duplicates are removed first, because beside its copy a text teaches only copying. The path is then cut into
contexts of exactly the asked length, so every token stands in one context; the last may be shorter.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rayrlhf.demonstrations.example import LeakRules, resemblance, words_of


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


def are_near_duplicates(first: str, second: str, rules: LeakRules) -> bool:
    """Whether two documents are as good as the same. Equal words count whatever their number.

    Args:
        first: a text.
        second: another one.
        rules: what counts as near.
    """
    words, others = words_of(first), words_of(second)
    if words == others:
        return True
    return min(len(words), len(others)) >= rules.words and resemblance(first, second) >= rules.resemblance


def duplicates_to_drop(copies: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Return which documents to leave out, each with the earlier document that stays for it.

    Only neighbours need to be compared, since near-duplicates are each other's nearest.

    Args:
        copies: pairs of near-duplicates, in any order and either way round.
    """
    removed: dict[int, int] = {}
    for earlier, later in sorted({(min(pair), max(pair)) for pair in copies if pair[0] != pair[1]}):
        if earlier not in removed and later not in removed:
            removed[later] = earlier
    return removed


def related_order(neighbors: Sequence[Sequence[int]], without: frozenset[int] = frozenset()) -> list[int]:
    """Return every document once, along the greedy path.

    Args:
        neighbors: positions of each document's neighbours, the nearest first; the path follows an edge from both of its ends,
            a document's own list before the lists that name it.
        without: documents that are left out.
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
    """Return every document once by lot: the baseline beside `related_order`."""
    order = [document for document in range(documents) if document not in without]
    random.Random(seed).shuffle(order)
    return order


def cut(order: Sequence[int], lengths: Sequence[int], context: int) -> list[list[Piece]]:
    """Return the contexts that the documents fill one after another.

    Args:
        order: documents as visited.
        lengths: tokens of each document; an empty one leaves no piece.
        context: tokens of a context.

    Raises:
        ValueError: a context without room.
    """
    if context < 1:
        raise ValueError(f"a context of {context} tokens has no room")
    contexts: list[list[Piece]] = []
    room = 0
    for document in order:
        start = 0
        while start < lengths[document]:
            if room == 0:
                contexts.append([])
                room = context
            taken = min(room, lengths[document] - start)
            contexts[-1].append(Piece(document, start, start + taken))
            start, room = start + taken, room - taken
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
