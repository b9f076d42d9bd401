"""Worker of `icl pack`: tokens, nearest neighbors and near-duplicates of a part of documents.

Texts, word index and vectors are in one folder that all processes map into memory. Workers read the neighbors' texts in
parallel, so that the driver walks the graph without reading text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayrlhf.config.icl import ICLPackConfig
from rayrlhf.data.words import words_of
from rayrlhf.demonstrations.example import Example, LeakRules
from rayrlhf.demonstrations.ranking import Bm25Ranker, Ranker, VectorRanker
from rayrlhf.library_types import ArrowTable
from rayrlhf.pipelines.icl.document_path import are_near_duplicates
from rayrlhf.pipelines.icl.example_pool import StoredPool

BM25, VECTORS, TOKENIZER = "bm25", "vectors.npy", "tokenizer"


@dataclass(frozen=True, slots=True)
class NeighborPlan:
    """Configuration of a worker, and the folder of the index.

    The folder is on this node or a shared disk.
    """

    config: ICLPackConfig
    index: Path


class DocumentEncoder:
    """Embeds a part of documents."""

    def __init__(self, config: ICLPackConfig) -> None:
        """Load the encoder."""
        from rayrlhf.demonstrations.encoder import Encoder

        self._encoder = Encoder(str(config.neighbors.encoder), config.neighbors.pooling)

    def __call__(self, table: ArrowTable) -> ArrowTable:
        """Return `vector`, a list of float32 per row."""
        import pyarrow as pa

        vectors = self._encoder.encode(table.column("prompt").to_pylist())
        return pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])})


class NeighborFinder:
    """Finds neighbors and near-duplicates of each document of a part."""

    def __init__(self, plan: NeighborPlan) -> None:
        """Open the index and load the tokenizer."""
        from transformers import AutoTokenizer

        self._config = plan.config
        self._pool = StoredPool(plan.index)
        self._vectors = np.load(plan.index / VECTORS, mmap_mode="r") if plan.config.neighbors.by == "nearest" else None
        words = plan.config.neighbors.query_words
        self._bm25 = None if self._vectors is not None else Bm25Ranker.open(plan.index / BM25, max_words=words)
        self._rules = LeakRules(plan.config.neighbors.resemblance, plan.config.neighbors.resembling_words)
        self._tokenizer = AutoTokenizer.from_pretrained(
            plan.index / TOKENIZER, trust_remote_code=plan.config.model.trust_remote_code, local_files_only=True
        )

    def __call__(self, table: ArrowTable) -> ArrowTable:
        """Return the links of a part, whose `row` is the position in the pool."""
        import pyarrow as pa

        positions: list[int] = table.column("row").to_pylist()
        documents = [self._pool[position] for position in positions]
        ranked = self._ranker(documents, positions).rank(documents, self._config.neighbors.count + 1)
        neighbors: list[list[int]] = []
        copies: list[list[int]] = []
        for document, position, near in zip(documents, positions, ranked, strict=True):
            related, copied = self._split(document, [other for other in near if other != position])
            neighbors.append(related[: self._config.neighbors.count])
            copies.append(copied)
        # Not verbose: the tokenizer would warn of texts beyond the model's context, which are cut later.
        tokens = self._tokenizer([document.prompt for document in documents], add_special_tokens=False, verbose=False)
        ends = [[*ids, self._tokenizer.eos_token_id] for ids in tokens["input_ids"]]
        columns = {"row": positions, "source": table.column("source").to_pylist()}
        return pa.table(columns | {"tokens": ends, "neighbors": neighbors, "copies": copies}, schema=link_schema())

    def _ranker(self, documents: Sequence[Example], positions: Sequence[int]) -> Ranker:
        if self._bm25 is not None:
            return self._bm25
        assert self._vectors is not None
        queries = {document.identity: self._vectors[position] for document, position in zip(documents, positions, strict=True)}
        return VectorRanker(self._vectors, queries)

    def _split(self, document: Example, near: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the related neighbors, and the near-duplicates."""
        texts = [self._pool[other].prompt for other in near]
        copies = [
            other for other, text in zip(near, texts, strict=True) if are_near_duplicates(document.prompt, text, self._rules)
        ]
        if self._vectors is not None:
            return list(near), copies
        # A ranker returns as many as requested. With BM25 only documents that share a word are neighbors.
        own = set(words_of(document.prompt))
        return [other for other, text in zip(near, texts, strict=True) if own & set(words_of(text))], copies


def link_schema() -> Any:
    """Return the columns of a part of links."""
    import pyarrow as pa

    listed = pa.list_(pa.int32())
    return pa.schema(
        [("row", pa.int64()), ("source", pa.int64()), ("tokens", listed), ("neighbors", listed), ("copies", listed)]
    )
