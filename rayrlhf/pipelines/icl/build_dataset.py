"""`icl build`: in-context SFT data, built by a pool of processes.

Each step is done once and survives interruption: ingestion to part files, the index as one folder, samples part by part, and
the dataset that `rayrlhf sft` reads, with a report of omitted rows and reasons.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rayrlhf.batch_inference.ingest import ingest_dataset
from rayrlhf.batch_inference.part_pipeline import Limits, cpu_pool, run_pipeline
from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.batch_inference.stage_resources import PartProgress
from rayrlhf.config.icl import ICLBuildConfig
from rayrlhf.config.loading.load import dump_config, stored_differences
from rayrlhf.demonstrations.ranking import Bm25Ranker, check_encoder
from rayrlhf.errors import UserError
from rayrlhf.observe.run_folder import open_run
from rayrlhf.pipelines.icl.example_pool import StoredPool, read_examples, write_pool, write_vectors
from rayrlhf.pipelines.icl.sample_builder import BM25, TOKENIZER, VECTORS, BuildPlan, SampleBuilder, sample_schema
from rayrlhf.storage.atomic import file_atomically, folder_atomically, write_atomically

DATASET, INDEX, REPORT = "dataset.parquet", "index", "report.json"
FREE = ("pipeline.builders", "pipeline.max_restarts", "pipeline.stall_seconds", "pipeline.address")
"""Settings without effect on the dataset."""
INGESTION = ("data.", "pipeline.rows_per_part")
"""Prefixes of the settings of ingestion; others may change until the index exists."""
ENCODED_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class BuildResult:
    """Result of a build.

    Attributes:
        dataset: Parquet, as `rayrlhf sft` reads it.
        report: counts of rows and demonstrations, as in `report.json`.
    """

    dataset: Path
    report: dict[str, Any]

    def lines(self) -> list[str]:
        """Return the report in words."""
        report = self.report
        shown = ", ".join(f"{count} with {number}" for number, count in report["shown"].items())
        leaks = ", ".join(f"{count} {reason}" for reason, count in report["leaks"].items()) or "none"
        left_out = {**report["rejected"], **report["problems"]}
        lines = [f"samples: {report['samples']} of {report['read']} rows; demonstrations: {shown}"]
        lines += [f"left out: {count} rows: {reason}" for reason, count in left_out.items()]
        lines.append(f"skipped as leaks: {leaks}; as repeated texts: {report['repeated']}")
        if report["dropped"]:
            lines.append(f"dropped as farthest, over sample.max_tokens: {report['dropped']} demonstrations")
        if report["short"]:
            lines.append(f"missing, because the task has no more: {report['short']} demonstrations")
        return [*lines, f"dataset: {self.dataset}"]


def check_build(config: ICLBuildConfig) -> str:
    """Check the configuration without reading data, and return the plan in words.

    Raises:
        UserError: no tokenizer, or no chat template where one is needed; an encoder's pooling is unknown.
    """
    from rayrlhf.data.templates import require_chat_template
    from rayrlhf.models.load import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    if config.sample.layout != "text":
        require_chat_template(tokenizer)
    check_encoder(config.demonstrations)
    shown, sample = config.demonstrations, config.sample
    targets = "every answer" if sample.loss_on == "every" else "the target's answer"
    return "\n".join(
        [
            f"run: {config.run.folder}, seed {config.run.seed}",
            f"examples: {config.data.path}, {config.data.prompt_field} and {config.data.response_field}"
            + (f", tasks by {config.data.task_field}" if config.data.task_field else ""),
            f"demonstrations: {shown.least} to {shown.most}, {shown.selection}, {shown.order.replace('_', ' ')}",
            f"samples: {sample.layout}, at most {sample.max_tokens} tokens, loss on {targets}",
        ]
    )


def build_dataset(config: ICLBuildConfig) -> BuildResult:
    """Build the dataset, or resume an interrupted build.

    Raises:
        UserError: an invalid configuration or dataset, see `check_build` and `ingest_dataset`; too few examples; no sample
            fits.
        ActorLostError: a process exceeded its restarts.
    """
    from rayrlhf.actors.connection import connected
    from rayrlhf.observe.live import LiveView

    check_build(config)
    folder = config.run.folder
    view = LiveView(f"rayrlhf icl build {config.run.name}", live=False)
    free = partial(may_change, indexed=(folder / INDEX).is_dir())
    compare = partial(stored_differences, ICLBuildConfig, may_change=free)
    with open_run(folder, dump_config(config), compare, folders=()):
        rows, samples = PartFolder(folder / "intake" / "rows"), PartFolder(folder / "samples")
        with view.wait("reading the examples"):
            rejected = PartFolder(folder / "intake" / "rejected")
            size = config.pipeline.rows_per_part
            ingest_dataset(config.data, rows, rejected, rows_per_part=size, tokenizer=None, longest=None)
        with view.wait("making the index"):
            index = _index(config, rows, folder / INDEX)
        with connected(config.pipeline.address):
            done = PartProgress(view).rows("building", rows.facts()["rows"])
            limits = Limits(config.pipeline.max_restarts, config.pipeline.stall_seconds)
            pool = cpu_pool("build", SampleBuilder, (BuildPlan(config, index.resolve()),), config.pipeline.builders)
            run_pipeline(rows, samples, [pool], limits, done)
        report = _report(rows, samples)
        if not report["samples"]:
            raise UserError(f"{config.data.path}: no row fits into sample.max_tokens {config.sample.max_tokens}")
        _merge(config, samples, folder / DATASET)
        write_atomically(folder / REPORT, json.dumps(report, indent=1) + "\n")
        return BuildResult(folder / DATASET, report)


def _index(config: ICLBuildConfig, rows: PartFolder, folder: Path) -> Path:
    """Write the index that the processes share, unless it exists."""
    from rayrlhf.models.load import load_tokenizer

    if folder.is_dir():
        return folder
    with folder_atomically(folder) as partial:
        write_pool(read_examples(config.data, rows), partial)
        load_tokenizer(config.model).save_pretrained(partial / TOKENIZER)
        pool = StoredPool(partial)
        most = config.demonstrations.most
        largest = max(len(positions) for positions in pool.tasks.values())
        if largest <= most:
            where = "its largest task" if config.data.task_field else "the dataset"
            raise UserError(
                f"{config.data.path}: {where} has {largest} examples, too few for {most} demonstrations each; "
                f"expected at least {most + 1}, or demonstrations.most {largest - 1}"
            )
        if config.demonstrations.selection == "bm25":
            Bm25Ranker.build((text for part in rows.tables(["prompt"]) for text in part.column(0).to_pylist()), partial / BM25)
        elif config.demonstrations.selection == "nearest":
            write_vectors(_vectors(config, pool), len(pool), partial / VECTORS)
    return folder


def _vectors(config: ICLBuildConfig, pool: StoredPool) -> Iterator[Any]:
    from rayrlhf.demonstrations.encoder import Encoder

    encoder = Encoder(str(config.demonstrations.encoder), config.demonstrations.pooling)
    for start in range(0, len(pool), ENCODED_AT_ONCE):
        yield encoder.encode([example.prompt for example in pool[start : start + ENCODED_AT_ONCE]])


def _report(rows: PartFolder, samples: PartFolder) -> dict[str, Any]:
    facts = rows.facts()
    sums: Counter[str] = Counter()
    shown: Counter[int] = Counter()
    leaks: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    names = ["short", "repeated", "dropped", "tokens"]
    for row in samples.rows([*names, "shown", "leaks", "problem"]):
        if row["problem"]:
            problems[row["problem"]] += 1
            continue
        sums.update({name: row[name] for name in names})
        shown[row["shown"]] += 1
        leaks.update(json.loads(row["leaks"]))
    return {
        "read": facts["read"],
        "samples": shown.total(),
        "rejected": facts["rejected"],
        "problems": dict(problems),
        "shown": {str(number): shown[number] for number in sorted(shown)},
        "leaks": dict(leaks),
        **{name: sums[name] for name in names},
    }


def _merge(config: ICLBuildConfig, samples: PartFolder, path: Path) -> None:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = sample_schema(config)
    with file_atomically(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for table in samples.tables():
            writer.write_table(table.filter(pc.equal(table.column("problem"), "")).select(schema.names))


def may_change(key: str, *, indexed: bool) -> bool:
    """Return True for a key that a resumed build may change.

    `indexed` means that the index exists.
    """
    return key in FREE or (not indexed and (key == "data.task_field" or not key.startswith(INGESTION)))
