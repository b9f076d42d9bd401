"""`icl build`: a dataset of examples becomes in-context SFT data, through an index on disk and parts in a pool of processes.

Each step is done once, whatever was interrupted: intake to part files, the index as one folder, samples part by part, and at
the end the dataset that `rayrlhf sft` reads, with a report of what was left out and why.
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
"""Settings that change nothing of what is made."""
OF_INTAKE = ("data.", "pipeline.rows_per_part")
"""Beginnings of the settings that the first step reads; the others may still be corrected until there is an index."""
ENCODED_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build leaves.

    Attributes:
        dataset: Parquet, as `rayrlhf sft` reads it.
        report: what became of rows and demonstrations, as in `report.json`.
    """

    dataset: Path
    report: dict[str, Any]

    def lines(self) -> list[str]:
        """Return the report in words."""
        told = self.report
        shown = ", ".join(f"{count} with {number}" for number, count in told["shown"].items())
        leaks = ", ".join(f"{count} {reason}" for reason, count in told["leaks"].items()) or "none"
        left_out = {**told["rejected"], **told["problems"]}
        lines = [f"samples: {told['samples']} of {told['read']} rows; demonstrations: {shown}"]
        lines += [f"left out: {count} rows: {reason}" for reason, count in left_out.items()]
        lines.append(f"passed over as leaks: {leaks}; as repeated texts: {told['repeated']}")
        if told["dropped"]:
            lines.append(f"dropped from the far end, over sample.max_tokens: {told['dropped']} demonstrations")
        if told["short"]:
            lines.append(f"missing, since the task has no more: {told['short']} demonstrations")
        return [*lines, f"dataset: {self.dataset}"]


def check_build(config: ICLBuildConfig) -> str:
    """Check what can be known without reading the data, and return the plan in words.

    Raises:
        UserError: the model has no tokenizer, or no chat template where one is needed; an encoder does not say how it pools.
    """
    from rayrlhf.data.templates import require_chat_template
    from rayrlhf.models.load import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    if config.sample.layout != "text":
        require_chat_template(tokenizer)
    check_encoder(config.demonstrations)
    shown, sample = config.demonstrations, config.sample
    what = "every answer" if sample.loss_on == "every" else "the target's answer"
    return "\n".join(
        [
            f"run: {config.run.folder}, seed {config.run.seed}",
            f"examples: {config.data.path}, {config.data.prompt_field} and {config.data.response_field}"
            + (f", tasks by {config.data.task_field}" if config.data.task_field else ""),
            f"demonstrations: {shown.least} to {shown.most}, {shown.selection}, {shown.order.replace('_', ' ')}",
            f"samples: {sample.layout}, at most {sample.max_tokens} tokens, loss on {what}",
        ]
    )


def build_dataset(config: ICLBuildConfig) -> BuildResult:
    """Make the dataset, or finish what an interrupted build began.

    Raises:
        UserError: a mistake in the configuration or the data, see `check_build` and `ingest_dataset`; fewer examples than
            demonstrations are asked for; no sample fits.
        ActorLostError: a process died more often than allowed.
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
    """Write what the processes share, unless it is there."""
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
                f"{config.data.path}: {where} has {largest} examples, too few for {most} demonstrations beside each of them; "
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
    """Whether a setting of a build that has begun may change; `indexed` says that there is an index."""
    return key in FREE or (not indexed and (key == "data.task_field" or not key.startswith(OF_INTAKE)))
