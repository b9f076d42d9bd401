"""Who is near whom: a ranker names, for each question, positions in the pool from the nearest on.

A ranking is a function of the question and the pool alone, never of the batch it came in, and a deeper ranking begins with the
shallower one. So the demonstrations for k = 4 contain those for k = 2, and a k-curve compares like with like. Ties go to the
earlier position.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rayrlhf.errors import UserError
from rayrlhf.icl.example import Example
from rayrlhf.icl.leaks import words_of


class Ranker(Protocol):
    """Names positions in a pool, the nearest first."""

    def rank(self, queries: Sequence[Example], depth: int) -> list[list[int]]:
        """Return min(depth, size of the pool) different positions for each query, the nearest first."""
        ...


class RandomRanker:
    """Ranks by lot, drawn from the seed and the query's identity."""

    def __init__(self, size: int, seed: int) -> None:
        """Rank a pool of `size` examples."""
        self._size, self._seed = size, seed

    def rank(self, queries: Sequence[Example], depth: int) -> list[list[int]]:
        """Return positions drawn without replacement; see `Ranker`."""
        return [self._draw(query, min(depth, self._size)) for query in queries]

    def _draw(self, query: Example, depth: int) -> list[int]:
        digest = hashlib.sha256(f"{self._seed}\0{query.identity}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(digest[:16]))
        moved: dict[int, int] = {}  # Fisher-Yates that stores only what it moved, so a deep pool costs nothing.
        drawn = []
        for place in range(depth):
            other = int(generator.integers(place, self._size))
            drawn.append(moved.get(other, other))
            moved[other] = moved.get(place, place)
        return drawn


class Bm25Ranker:
    """Ranks by BM25 of the prompts' words (Robertson and Zaragoza 2009, Lucene's variant, k1 = 1.5, b = 0.75)."""

    def __init__(self, index: Any, size: int) -> None:
        """Take an index as `build` and `open` make them."""
        self._index, self._size = index, size

    @classmethod
    def build(cls, texts: Sequence[str], folder: Path | None = None) -> "Bm25Ranker":
        """Index texts, and store the index where a folder is given.

        Raises:
            UserError: no text has a word.
        """
        import bm25s

        words = [words_of(text) for text in texts]
        if not any(words):
            raise UserError(f"BM25: none of the {len(words)} examples has a word in its prompt, expected text to search")
        index = bm25s.BM25()
        index.index(words, show_progress=False)
        if folder is not None:
            index.save(str(folder), show_progress=False)
        return cls(index, len(words))

    @classmethod
    def open(cls, folder: Path) -> "Bm25Ranker":
        """Open a stored index memory-mapped, so that processes of one machine share its pages."""
        import bm25s

        index = bm25s.BM25.load(str(folder), mmap=True, show_progress=False)
        return cls(index, int(index.scores["num_docs"]))

    def rank(self, queries: Sequence[Example], depth: int) -> list[list[int]]:
        """Return positions by falling score; see `Ranker`."""
        return [_nearest(self._scores(query), depth) for query in queries]

    def _scores(self, query: Example) -> NDArray[np.float32]:
        known = [word for word in words_of(query.prompt) if word in self._index.vocab_dict]
        if not known:
            return np.zeros(self._size, dtype=np.float32)
        scores: NDArray[np.float32] = self._index.get_scores(known)
        return scores


class VectorRanker:
    """Ranks by cosine of embeddings."""

    def __init__(self, pool: NDArray[np.float32], queries: dict[str, NDArray[np.float32]]) -> None:
        """Rank a pool by vectors.

        Args:
            pool: [examples, width], rows of length 1; may be memory-mapped.
            queries: vector of each query by its identity, [width], of length 1.
        """
        self._pool, self._queries = pool, queries

    def rank(self, queries: Sequence[Example], depth: int) -> list[list[int]]:
        """Return positions by falling cosine; see `Ranker`."""
        return [_nearest(self._pool @ self._queries[query.identity], depth) for query in queries]


def _nearest(scores: NDArray[np.float32], depth: int) -> list[int]:
    depth = min(depth, len(scores))
    if depth == 0:
        return []
    # Everything that ties with the last place has to be looked at, or the earlier position could lose.
    last = -np.partition(-scores, depth - 1)[depth - 1]
    candidates = np.flatnonzero(scores >= last)
    best = candidates[np.argsort(-scores[candidates], kind="stable")[:depth]]
    return [int(position) for position in best]
