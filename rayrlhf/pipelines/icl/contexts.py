"""Packed contexts on disk, gathered from a memory-mapped token file, and the relatedness of neighbors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.data.words import words_of
from rayrlhf.demonstrations.example import Example
from rayrlhf.pipelines.icl.document_path import Piece
from rayrlhf.storage.atomic import file_atomically, folder_atomically

IDS, LENGTHS, SOURCES = "ids.bin", "lengths.npy", "sources.npy"
CONTEXTS_AT_ONCE = 1024
MAX_PAIRS = 20_000
"""Maximum pairs compared for the report, evenly spaced in the order."""


class StoredTokens:
    """Memory-mapped tokens of all documents.

    Attributes:
        lengths: int64 [documents], tokens of each.
        sources: int64 [documents], row in the dataset.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder of `write_tokens`."""
        self.lengths: NDArray[np.int64] = np.load(folder / LENGTHS)
        self.sources: NDArray[np.int64] = np.load(folder / SOURCES)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._ids = np.memmap(folder / IDS, dtype=np.int32, mode="r")

    def gather(self, pieces: Sequence[Piece]) -> NDArray[np.int32]:
        """Return the concatenated tokens of pieces."""
        starts = [int(self._starts[piece.document]) for piece in pieces]
        return np.concatenate(
            [self._ids[start + piece.start : start + piece.stop] for start, piece in zip(starts, pieces, strict=True)]
        )


def write_tokens(links: PartFolder, folder: Path) -> None:
    """Write `tokens` and `source` of all parts, unless they exist; one part in memory."""
    if folder.is_dir():
        return
    lengths: list[NDArray[np.int64]] = []
    sources: list[NDArray[np.int64]] = []
    with folder_atomically(folder) as partial:
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / IDS).open("wb") as file:
            for table in links.tables(["source", "tokens"]):
                column = table.column("tokens").combine_chunks()
                np.asarray(column.flatten(), dtype=np.int32).tofile(file)
                lengths.append(np.asarray(column.value_lengths(), dtype=np.int64))
                sources.append(np.asarray(table.column("source"), dtype=np.int64))
        np.save(partial / LENGTHS, np.concatenate(lengths))
        np.save(partial / SOURCES, np.concatenate(sources))


def write_contexts(contexts: Sequence[Sequence[Piece]], tokens: StoredTokens, path: Path) -> None:
    """Write one row per context: `input_ids`, and `documents`, the source rows of its pieces."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("documents", pa.list_(pa.int64()))])
    with file_atomically(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for start in range(0, len(contexts), CONTEXTS_AT_ONCE):
            some = contexts[start : start + CONTEXTS_AT_ONCE]
            ids = [tokens.gather(pieces) for pieces in some]
            documents = [[int(tokens.sources[piece.document]) for piece in pieces] for pieces in some]
            writer.write_table(pa.table({"input_ids": ids, "documents": documents}, schema=schema))


def relatedness(order: Sequence[int], pool: Sequence[Example], vectors: NDArray[np.float32] | None) -> dict[str, float]:
    """Return the mean similarity of consecutive documents, over at most `MAX_PAIRS` pairs.

    Args:
        order: documents in order.
        vectors: [documents, width], rows of length 1, or None.

    Returns:
        `shared words`, the Jaccard index of the sets of words, in [0, 1]; with vectors also `cosine`. Empty for fewer than
        two documents.
    """
    if len(order) < 2:
        return {}
    places = np.unique(np.linspace(0, len(order) - 2, MAX_PAIRS).astype(int)).tolist()
    pairs = [(order[place], order[place + 1]) for place in places]
    shared = [_shared(set(words_of(pool[first].prompt)), set(words_of(pool[second].prompt))) for first, second in pairs]
    measures: dict[str, Any] = {"shared words": np.mean(shared)}
    if vectors is not None:
        measures["cosine"] = np.mean([vectors[first] @ vectors[second] for first, second in pairs])
    return {name: float(value) for name, value in measures.items()}


def _shared(first: set[str], second: set[str]) -> float:
    return len(first & second) / len(first | second) if first | second else 1.0
