"""`icl pack`: contexts in which related documents are adjacent.

A baseline has the same documents in random order.

Each step is done once and survives interruption: ingestion to part files, vectors if an encoder is configured, the index as
one folder, links part by part in a pool of processes. The driver then walks the graph, of which it holds only the edges, and
writes contexts from a memory-mapped token file. `rayrlhf sft` reads them as they are (`input_ids`).
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rayrlhf.batch_inference.part_pipeline import Limits, cpu_pool, run_pipeline
from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.batch_inference.stage_resources import PartProgress
from rayrlhf.config.icl import ICLPackConfig
from rayrlhf.config.loading.load import dump_config, stored_differences
from rayrlhf.demonstrations.ranking import Bm25Ranker
from rayrlhf.errors import UserError
from rayrlhf.observe.run_folder import open_run
from rayrlhf.pipelines.icl.contexts import StoredTokens, relatedness, write_contexts, write_tokens
from rayrlhf.pipelines.icl.document_path import cut, duplicates_to_drop, random_order, related_order
from rayrlhf.pipelines.icl.example_pool import StoredPool, ingest_examples, read_examples, write_pool, write_vectors
from rayrlhf.pipelines.icl.neighbors import BM25, TOKENIZER, VECTORS, DocumentEncoder, NeighborFinder, NeighborPlan
from rayrlhf.storage.atomic import folder_atomically, write_atomically

DATASET, BASELINE, INDEX, TOKENS, REPORT = "dataset.parquet", "baseline.parquet", "index", "tokens", "report.json"
FREE = ("pipeline.builders", "pipeline.max_restarts", "pipeline.stall_seconds", "pipeline.address")
"""Settings without effect on the dataset."""


@dataclass(frozen=True, slots=True)
class PackResult:
    """Result of a packing.

    Attributes:
        dataset: Parquet, contexts along the path of related documents.
        baseline: the same documents in random order.
        report: counts of documents, as in `report.json`.
    """

    dataset: Path
    baseline: Path
    report: dict[str, Any]

    def lines(self) -> list[str]:
        """Return the report in words."""
        report = self.report
        lines = [
            f"contexts: {report['contexts']} of {report['context']} tokens, {report['documents']} of {report['read']} documents"
        ]
        lines += [f"left out: {count} documents: {reason}" for reason, count in report["rejected"].items()]
        lines.append(f"left out: {report['near_duplicates']} near-duplicates; without any neighbor: {report['alone']}")
        for measure, value in report["relatedness"].items():
            baseline = report["relatedness_at_random"][measure]
            lines.append(f"adjacent documents: {measure} {value:.3f}, at random {baseline:.3f}")
        return [*lines, f"dataset: {self.dataset}", f"at random: {self.baseline}"]


def check_packing(config: ICLPackConfig) -> str:
    """Check the configuration without reading data, and return the plan in words.

    Raises:
        UserError: no tokenizer or no end-of-sequence token; an encoder's pooling is unknown.
    """
    from rayrlhf.config.model import ModelSection
    from rayrlhf.demonstrations.encoder import pooling_of
    from rayrlhf.models.load import load_tokenizer
    from rayrlhf.models.model_path import model_folder

    near = config.neighbors
    if load_tokenizer(config.model).eos_token_id is None:
        raise UserError(f"{config.model.path}: no end-of-sequence token, which separates documents")
    if near.encoder is not None and near.pooling is None:
        pooling_of(model_folder(ModelSection(path=near.encoder)))
    by = "shared words (BM25)" if near.by == "bm25" else f"vectors of {near.encoder}"
    return "\n".join(
        [
            f"run: {config.run.folder}, seed {config.run.seed}",
            f"documents: {config.data.path}, {config.data.text_field}",
            f"neighbors: {near.count} by {by}",
            f"contexts: {config.context} tokens, with related documents adjacent; the baseline has random order",
        ]
    )


def pack_documents(config: ICLPackConfig) -> PackResult:
    """Write both datasets, or resume an interrupted packing.

    Raises:
        UserError: an invalid configuration or dataset, see `check_packing` and `ingest_dataset`.
        ActorLostError: a process exceeded its restarts.
    """
    from rayrlhf.actors.connection import connected
    from rayrlhf.observe.live import LiveView

    check_packing(config)
    folder = config.run.folder
    view = LiveView(f"rayrlhf icl pack {config.run.name}", live=False)
    compare = partial(stored_differences, ICLPackConfig, may_change=FREE.__contains__)
    with open_run(folder, dump_config(config), compare, folders=()):
        with view.wait("reading the documents"):
            rows = ingest_examples(config.data.examples(), folder / "intake", config.pipeline.rows_per_part, answered=False)
        limits = Limits(config.pipeline.max_restarts, config.pipeline.stall_seconds)
        vectors, links = PartFolder(folder / "vectors"), PartFolder(folder / "links")
        count = rows.facts()["rows"]
        with connected(config.pipeline.address):
            if config.neighbors.by == "nearest" and not (folder / INDEX).is_dir():
                stage = cpu_pool("encode", DocumentEncoder, (config,), config.pipeline.builders)
                run_pipeline(rows, vectors, [stage], limits, PartProgress(view).rows("encoding", count))
            with view.wait("making the index"):
                index = _index(config, rows, vectors, folder / INDEX)
            stage = cpu_pool("link", NeighborFinder, (NeighborPlan(config, index.resolve()),), config.pipeline.builders)
            run_pipeline(rows, links, [stage], limits, PartProgress(view).rows("linking", count))
        with view.wait("writing the contexts"):
            report = _write_datasets(config, rows, links, folder)
        write_atomically(folder / REPORT, json.dumps(report, indent=1) + "\n")
        return PackResult(folder / DATASET, folder / BASELINE, report)


def _index(config: ICLPackConfig, rows: PartFolder, vectors: PartFolder, folder: Path) -> Path:
    """Write the index that the processes share, unless it exists."""
    from rayrlhf.models.load import load_tokenizer

    if folder.is_dir():
        return folder
    with folder_atomically(folder) as partial:
        write_pool(read_examples(config.data.examples(), rows), partial)
        load_tokenizer(config.model).save_pretrained(partial / TOKENIZER)
        if config.neighbors.by == "bm25":
            Bm25Ranker.build((text for part in rows.tables(["prompt"]) for text in part.column(0).to_pylist()), partial / BM25)
        else:
            write_vectors(_read_vectors(vectors), rows.facts()["rows"], partial / VECTORS)
    return folder


def _read_vectors(parts: PartFolder) -> Iterator[Any]:
    for table in parts.tables():
        column = table.column("vector").combine_chunks()
        yield np.asarray(column.flatten(), dtype=np.float32).reshape(len(column), -1)


def _write_datasets(config: ICLPackConfig, rows: PartFolder, links: PartFolder, folder: Path) -> dict[str, Any]:
    """Walk the graph, write both datasets, and return the report."""
    neighbors: list[list[int]] = []
    copies: list[tuple[int, int]] = []
    for table in links.tables(["row", "neighbors", "copies"]):
        neighbors += table.column("neighbors").to_pylist()
        own, copied = (table.column(name).to_pylist() for name in ("row", "copies"))
        copies += [(row, other) for row, others in zip(own, copied, strict=True) for other in others]
    removed = duplicates_to_drop(copies)
    orders = {
        DATASET: related_order(neighbors, frozenset(removed)),
        BASELINE: random_order(len(neighbors), config.run.seed, frozenset(removed)),
    }
    write_tokens(links, folder / TOKENS)
    tokens = StoredTokens(folder / TOKENS)
    for name, order in orders.items():
        contexts = cut(order, tokens.lengths.tolist(), config.context)
        write_contexts(contexts, tokens, folder / name)
    index = folder / INDEX
    pool = StoredPool(index)
    vectors = np.load(index / VECTORS, mmap_mode="r") if config.neighbors.by == "nearest" else None
    joined = Counter(near for listed in neighbors for near in listed)
    facts = rows.facts()
    return {
        "read": facts["read"],
        "rejected": facts["rejected"],
        "near_duplicates": len(removed),
        "documents": len(orders[DATASET]),
        "alone": sum(not listed and not joined[row] for row, listed in enumerate(neighbors) if row not in removed),
        "context": config.context,
        "contexts": -(-int(tokens.lengths[orders[DATASET]].sum()) // config.context),
        "relatedness": relatedness(orders[DATASET], pool, vectors),
        "relatedness_at_random": relatedness(orders[BASELINE], pool, vectors),
    }
