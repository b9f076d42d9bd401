"""Rankers: the positions of a pool per question, nearest first.

A ranking depends only on the question and the pool, not on the batch, and a deeper ranking extends the shallower one. So the
demonstrations for k = 4 contain those for k = 2, and a k-curve compares like with like. Ties go to the earlier position. In a
pool of several tasks only positions of the question's own task are returned.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rayrlhf.config.rollout import SelectionSection
from rayrlhf.data.word_index import WordIndex, nearest
from rayrlhf.demonstrations.example import Example

AT_ONCE = 64
"""Queries per pass over a pool of vectors."""
ROUGHNESS = 1e-4
"""Upper bound of the difference between two summation orders of a float32 dot product of vectors of length 1."""
Tasks = Mapping[str, NDArray[np.int64]]
"""Positions of each task in a pool, ascending."""


class Ranker(Protocol):
    """Ranks a pool per query."""

    def rank(self, queries: Sequence[Example], depth: int) -> list[list[int]]:
        """Return up to `depth` distinct positions per query, nearest first."""
        ...


class RandomRanker:
    """Ranks at random, seeded by the seed and the query's identity."""

    def __init__(self, size: int, seed: int, tasks: Tasks | None = None) -> None:
        """Rank a pool of `size` examples; `tasks` None means a single task."""
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
        moved: dict[int, int] = {}  # Fisher-Yates that stores only moved positions, so a large pool costs nothing.
        drawn = []
        for place in range(min(depth, size)):
            other = int(generator.integers(place, size))
            drawn.append(moved.get(other, other))
            moved[other] = moved.get(place, place)
        return drawn


class Bm25Ranker:
    """Ranks by BM25 of the prompts' words.

    Args:
        index: of the pool's prompts.
        max_words: see `WordIndex.scores`.
    """

    def __init__(self, index: WordIndex, tasks: Tasks | None = None, max_words: int | None = None) -> None:
        self._index, self._tasks, self._max_words = index, tasks, max_words

    @classmethod
    def build(cls, texts: Iterable[str], folder: Path | None = None, tasks: Tasks | None = None) -> "Bm25Ranker":
        """Build an index; see `WordIndex.build`. `tasks` is as for `RandomRanker`."""
        return cls(WordIndex.build(texts, folder), tasks)

    @classmethod
    def open(cls, folder: Path, tasks: Tasks | None = None, max_words: int | None = None) -> "Bm25Ranker":
        """Open a saved index; see `WordIndex.open`."""
        return cls(WordIndex.open(folder), tasks, max_words)

    def rank(self, queries: Sequence[Example], depth: int) -> list[list[int]]:
        """Return positions by descending score; see `Ranker`."""
        scores = (self._index.scores(query.prompt, self._max_words) for query in queries)
        return [_nearest_of_task(of_query, query, self._tasks, depth) for of_query, query in zip(scores, queries, strict=True)]


class VectorRanker:
    """Ranks by cosine similarity of embeddings."""

    def __init__(
        self, pool: NDArray[np.float32], queries: Mapping[str, NDArray[np.float32]], tasks: Tasks | None = None
    ) -> None:
        """Rank a pool by vectors.

        Args:
            pool: [examples, width], rows of length 1; may be memory-mapped.
            queries: vector of each query by its identity, [width], of length 1.
        """
        self._pool, self._queries, self._tasks = pool, queries, tasks

    def rank(self, queries: Sequence[Example], depth: int) -> list[list[int]]:
        """Return positions by descending cosine; see `Ranker`."""
        if self._tasks is not None:
            own = [_positions(self._tasks, query) for query in queries]
            return [
                [int(places[near]) for near in nearest(_cosines(self._pool[places], self._queries[query.identity]), depth)]
                for query, places in zip(queries, own, strict=True)
            ]
        found: list[list[int]] = []
        for start in range(0, len(queries), AT_ONCE):
            vectors = np.stack([self._queries[query.identity] for query in queries[start : start + AT_ONCE]])
            # One pass over the pool for many queries. Its last bits depend on the batch, so it only preselects.
            rough = vectors @ self._pool.T
            found += [self._nearest(vector, row, depth) for vector, row in zip(vectors, rough, strict=True)]
        return found

    def _nearest(self, query: NDArray[np.float32], rough: NDArray[np.float32], depth: int) -> list[int]:
        depth = min(depth, len(rough))
        if depth == 0:
            return []
        last = np.partition(rough, len(rough) - depth)[len(rough) - depth]
        near = np.flatnonzero(rough >= last - ROUGHNESS)
        return [int(near[place]) for place in nearest(_cosines(self._pool[near], query), depth)]


def make_rankers(
    section: SelectionSection, targets: Sequence[Example], pool: Sequence[Example], seed: int, *, by_task: bool
) -> Callable[[int], Ranker]:
    """Return the ranker per draw 0, 1, ...; deterministic rankers ignore the draw.

    Args:
        pool: the examples that positions index; may be `targets` itself.
        by_task: True returns only examples of a target's own task.

    Raises:
        UserError: no prompt of the pool has a word, for `bm25`; the encoder's pooling is unknown, for `nearest`.
    """
    texts = [example.prompt for example in pool]
    tasks = positions_by_task(pool) if by_task else None
    if section.selection == "random":
        return lambda draw: RandomRanker(len(texts), seed + draw, tasks)
    if section.selection == "bm25":
        lexical = Bm25Ranker.build(texts, tasks=tasks)
        return lambda _: lexical
    from rayrlhf.demonstrations.encoder import Encoder

    encoder = Encoder(str(section.encoder), section.pooling)
    own = encoder.encode([target.prompt for target in targets])
    queries = {target.identity: vector for target, vector in zip(targets, own, strict=True)}
    near = VectorRanker(own if pool is targets else encoder.encode(texts), queries, tasks)
    return lambda _: near


def check_encoder(section: SelectionSection) -> None:
    """Check that the pooling of the `nearest` encoder is known, without loading it.

    Raises:
        UserError: it is unknown, or the encoder is missing.
    """
    from rayrlhf.config.model import ModelSection
    from rayrlhf.demonstrations.encoder import pooling_of
    from rayrlhf.models.model_path import model_folder

    if section.encoder is not None and section.pooling is None:
        pooling_of(model_folder(ModelSection(path=section.encoder)))


def positions_by_task(pool: Sequence[Example]) -> Tasks:
    """Return the positions of each task."""
    positions: dict[str, list[int]] = {}
    for position, example in enumerate(pool):
        positions.setdefault(example.task, []).append(position)
    return {task: np.array(places, dtype=np.int64) for task, places in positions.items()}


def _cosines(pool: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return dot products [rows], bitwise independent of the other rows."""
    products: NDArray[np.float32] = np.einsum("rw,w->r", pool, query)
    return products


def _positions(tasks: Tasks, query: Example) -> NDArray[np.int64]:
    return tasks.get(query.task, np.zeros(0, dtype=np.int64))


def _nearest_of_task(scores: NDArray[np.float32], query: Example, tasks: Tasks | None, depth: int) -> list[int]:
    if tasks is None:
        return nearest(scores, depth)
    positions = _positions(tasks, query)
    return [int(positions[place]) for place in nearest(scores[positions], depth)]
