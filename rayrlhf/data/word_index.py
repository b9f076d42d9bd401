"""Index of texts by their words, with BM25 scores.

Robertson and Zaragoza 2009, Lucene's variant, k1 = 1.5, b = 0.75.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayrlhf.data.words import search_words
from rayrlhf.errors import UserError


class WordIndex:
    """Texts in memory or in a folder, searched by words.

    Args:
        index: of `bm25s`.
        size: number of texts in it.
    """

    def __init__(self, index: Any, size: int) -> None:
        self._index, self._size = index, size

    @classmethod
    def build(cls, texts: Iterable[str], folder: Path | None = None) -> "WordIndex":
        """Build an index of texts, and save it where a folder is given.

        Only words are held in memory.

        Raises:
            UserError: no text has a word.
        """
        import bm25s

        # One string object per distinct word: a long document costs eight bytes per word.
        known: dict[str, str] = {}
        words = [[known.setdefault(word, word) for word in search_words(text)] for text in texts]
        if not any(words):
            raise UserError(f"BM25: none of the {len(words)} texts has a word, expected text to search")
        index = bm25s.BM25()
        index.index(words, show_progress=False)
        if folder is not None:
            index.save(str(folder), show_progress=False)
        return cls(index, len(words))

    @classmethod
    def open(cls, folder: Path) -> "WordIndex":
        """Open a saved index memory-mapped, so that processes of a node share its pages."""
        import bm25s

        index = bm25s.BM25.load(str(folder), mmap=True, show_progress=False)
        return cls(index, int(index.scores["num_docs"]))

    def scores(self, query: str, max_words: int | None = None) -> NDArray[np.float32]:
        """Return the score of each text, float32 [N]; 0 without a common word.

        Args:
            max_words: a longer query is reduced to this many distinct words, the rarest; None uses all words, with their
                counts.
        """
        known = [word for word in search_words(query) if word in self._index.vocab_dict]
        if not known:
            return np.zeros(self._size, dtype=np.float32)
        if max_words is not None:
            known = sorted(dict.fromkeys(known), key=self._texts_with)[:max_words]
        scores: NDArray[np.float32] = self._index.get_scores(known)
        return scores

    def best(self, query: str, depth: int) -> list[int]:
        """Return the positions of the best texts with a word of the query."""
        scores = self.scores(query)
        return [position for position in nearest(scores, depth) if scores[position] > 0]

    def _texts_with(self, word: str) -> int:
        """Return the number of texts with a word: the length of its column."""
        column = self._index.vocab_dict[word]
        starts = self._index.scores["indptr"]
        return int(starts[column + 1] - starts[column])


def nearest(scores: NDArray[np.float32], depth: int) -> list[int]:
    """Return the positions of the `depth` highest scores, highest first.

    Ties go to the earlier position.
    """
    depth = min(depth, len(scores))
    if depth == 0:
        return []
    # All ties of the last place are considered, so that the earlier position wins.
    last = -np.partition(-scores, depth - 1)[depth - 1]
    candidates = np.flatnonzero(scores >= last)
    best = candidates[np.argsort(-scores[candidates], kind="stable")[:depth]]
    return [int(position) for position in best]
