"""Who is near whom: a ranker names, for each question, positions in the pool from the nearest on.

A ranking is a function of the question and the pool alone, never of the batch it came in, and a deeper ranking begins with the
shallower one. So the demonstrations for k = 4 contain those for k = 2, and a k-curve compares like with like. Ties go to the
earlier position. Where a pool holds several tasks, only positions of the question's own task are named.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rayrlhf.demonstrations.example import Example
from rayrlhf.demonstrations.leaks import words_of
from rayrlhf.errors import UserError

AT_ONCE = 64
"""Queries that are compared with a pool of vectors in one pass over it."""
ROUGHNESS = 1e-4
"""More than two ways to add up the product of two float32 vectors of length 1 differ by."""
Tasks = Mapping[str, NDArray[np.int64]]
"""The positions of each task in a pool, in rising order."""


class Ranker(Protocol):
    """Names positions in a pool, the nearest first."""

    def rank(self, queries: Sequence[Example], depth: int) -> list[list[int]]:
        """Return different positions for each query, the nearest first: `depth` of them, or all there are."""
        ...


class RandomRanker:
    """Ranks by lot, drawn from the seed and the query's identity."""

    def __init__(self, size: int, seed: int, tasks: Tasks | None = None) -> None:
        """Rank a pool of `size` examples; `tasks` says which of them are of one task, None that all are."""
        self._size, self._seed, self._tasks = size, seed, tasks

    def rank(self, queries: Sequence[Example], depth: int) -> list[list[int]]:
        """Return positions drawn without replacement; see `Ranker`."""
        if self._tasks is None:
            return [self._draw(query, self._size, depth) for query in queries]
        of_task = [_positions(self._tasks, query) for query in queries]
        return [
            [int(positions[place]) for place in self._draw(query, len(positions), depth)]
            for query, positions in zip(queries, of_task, strict=True)
        ]

    def _draw(self, query: Example, size: int, depth: int) -> list[int]:
        digest = hashlib.sha256(f"{self._seed}\0{query.identity}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:16]))
        moved: dict[int, int] = {}  # Fisher-Yates that stores only what it moved, so a deep pool costs nothing.
        drawn = []
        for place in range(min(depth, size)):
            other = int(generator.integers(place, size))
            drawn.append(moved.get(other, other))
            moved[other] = moved.get(place, place)
        return drawn


class Bm25Ranker:
    """Ranks by BM25 of the prompts' words (Robertson and Zaragoza 2009, Lucene's variant, k1 = 1.5, b = 0.75)."""

    def __init__(self, index: Any, size: int, tasks: Tasks | None = None, most_words: int | None = None) -> None:
        """Take an index as `build` and `open` make them.

        Args:
            index: of `bm25s`.
            size: number of texts in it.
            tasks: as for `RandomRanker`.
            most_words: a longer question asks with so many of its different words, the rarest; None asks with all of them,
                as often as they stand in it.
        """
        self._index, self._size, self._tasks, self._most_words = index, size, tasks, most_words

    @classmethod
    def build(cls, texts: Iterable[str], folder: Path | None = None, tasks: Tasks | None = None) -> "Bm25Ranker":
        """Index texts, of which only the words are held in memory, and store the index where a folder is given.

        `tasks` is as for `RandomRanker`.

        Raises:
            UserError: no text has a word.
        """
        import bm25s

        # One object for a word however often it occurs: a long document costs eight bytes a word here.
        known: dict[str, str] = {}
        words = [[known.setdefault(word, word) for word in words_of(text)] for text in texts]
        if not any(words):
            raise UserError(f"BM25: none of the {len(words)} examples has a word in its prompt, expected text to search")
        index = bm25s.BM25()
        index.index(words, show_progress=False)
        if folder is not None:
            index.save(str(folder), show_progress=False)
        return cls(index, len(words), tasks)

    @classmethod
    def open(cls, folder: Path, tasks: Tasks | None = None, most_words: int | None = None) -> "Bm25Ranker":
        """Open a stored index memory-mapped, so that processes of one machine share its pages; arguments as `__init__`."""
        import bm25s

        index = bm25s.BM25.load(str(folder), mmap=True, show_progress=False)
        return cls(index, int(index.scores["num_docs"]), tasks, most_words)

    def rank(self, queries: Sequence[Example], depth: int) -> list[list[int]]:
        """Return positions by falling score; see `Ranker`."""
        return [_nearest_of_task(self._scores(query), query, self._tasks, depth) for query in queries]

    def _scores(self, query: Example) -> NDArray[np.float32]:
        known = [word for word in words_of(query.prompt) if word in self._index.vocab_dict]
        if not known:
            return np.zeros(self._size, dtype=np.float32)
        if self._most_words is not None:
            known = sorted(dict.fromkeys(known), key=self._texts_with)[: self._most_words]
        scores: NDArray[np.float32] = self._index.get_scores(known)
        return scores

    def _texts_with(self, word: str) -> int:
        """Return how many texts have a word: the length of its column."""
        column = self._index.vocab_dict[word]
        starts = self._index.scores["indptr"]
        return int(starts[column + 1] - starts[column])


class VectorRanker:
    """Ranks by cosine of embeddings."""

    def __init__(
        self, pool: NDArray[np.float32], queries: Mapping[str, NDArray[np.float32]], tasks: Tasks | None = None
    ) -> None:
        """Rank a pool by vectors.

        Args:
            pool: [examples, width], rows of length 1; may be memory-mapped.
            queries: vector of each query by its identity, [width], of length 1.
            tasks: as for `RandomRanker`.
        """
        self._pool, self._queries, self._tasks = pool, queries, tasks

    def rank(self, queries: Sequence[Example], depth: int) -> list[list[int]]:
        """Return positions by falling cosine; see `Ranker`."""
        if self._tasks is not None:
            own = [_positions(self._tasks, query) for query in queries]
            return [
                [int(places[near]) for near in _nearest(_cosines(self._pool[places], self._queries[query.identity]), depth)]
                for query, places in zip(queries, own, strict=True)
            ]
        found: list[list[int]] = []
        for start in range(0, len(queries), AT_ONCE):
            vectors = np.stack([self._queries[query.identity] for query in queries[start : start + AT_ONCE]])
            # One pass over the pool for many queries. Such a product's last bits depend on the batch: it only says who is near.
            rough = vectors @ self._pool.T
            found += [self._nearest(vector, row, depth) for vector, row in zip(vectors, rough, strict=True)]
        return found

    def _nearest(self, query: NDArray[np.float32], rough: NDArray[np.float32], depth: int) -> list[int]:
        depth = min(depth, len(rough))
        if depth == 0:
            return []
        last = np.partition(rough, len(rough) - depth)[len(rough) - depth]
        near = np.flatnonzero(rough >= last - ROUGHNESS)
        return [int(near[place]) for place in _nearest(_cosines(self._pool[near], query), depth)]


def _cosines(pool: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row's product with the query, [rows], whose bits depend on nothing but that row and the query."""
    products: NDArray[np.float32] = np.einsum("rw,w->r", pool, query)
    return products


def _positions(tasks: Tasks, query: Example) -> NDArray[np.int64]:
    return tasks.get(query.task, np.zeros(0, dtype=np.int64))


def _nearest_of_task(scores: NDArray[np.float32], query: Example, tasks: Tasks | None, depth: int) -> list[int]:
    if tasks is None:
        return _nearest(scores, depth)
    positions = _positions(tasks, query)
    return [int(positions[place]) for place in _nearest(scores[positions], depth)]


def _nearest(scores: NDArray[np.float32], depth: int) -> list[int]:
    depth = min(depth, len(scores))
    if depth == 0:
        return []
    # Everything that ties with the last place has to be looked at, or the earlier position could lose.
    last = -np.partition(-scores, depth - 1)[depth - 1]
    candidates = np.flatnonzero(scores >= last)
    best = candidates[np.argsort(-scores[candidates], kind="stable")[:depth]]
    return [int(position) for position in best]
