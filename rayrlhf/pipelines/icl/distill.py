"""`icl distill`: context distillation of demonstrations or an instruction.

The student answers without a context as the teacher does with one.

Each step is done once and survives interruption: ingestion to part files; contexts, with demonstrations selected by the rules
of `icl evaluate` (never the prompt itself or its text); optionally responses that the teacher generates; one dataset of
prompts, contexts and responses; and the training (`rayrlhf.tuning.distillation_task`) in `student/`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rayrlhf.batch_inference.generation import check_generator
from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.batch_inference.source import messages_type
from rayrlhf.batch_inference.stage_resources import PartProgress
from rayrlhf.config.data import DistillationDataSection, SupervisedDatasetSection
from rayrlhf.config.icl import ICLDistillConfig, ShotsSection
from rayrlhf.config.loading.load import dump_config, stored_differences
from rayrlhf.config.rollout import SelectionSection
from rayrlhf.config.tuning import DistillationConfig, TuningRunSection
from rayrlhf.data.messages import Message
from rayrlhf.demonstrations.choosing import ChoiceCounts, require_pool
from rayrlhf.demonstrations.context import TextForm, as_messages, as_text
from rayrlhf.demonstrations.ranking import check_encoder, make_rankers
from rayrlhf.errors import UserError
from rayrlhf.observe.run_folder import open_run
from rayrlhf.pipelines.icl.answering import answer_plan, answer_questions, load_context_tokenizer
from rayrlhf.pipelines.icl.example_pool import describe_pool, ingest_examples, read_examples
from rayrlhf.pipelines.icl.questions import QuestionBuilder, question_schema
from rayrlhf.storage.atomic import file_atomically, write_atomically

DATASET, REPORT, STUDENT = "dataset.parquet", "report.json", "student"
FREE = ("pipeline.", "workers.")
"""Prefixes of settings without effect on the student."""
END_TOKENS = 16
"""Maximum tokens that a chat template appends to a response."""


@dataclass(frozen=True, slots=True)
class DistillResult:
    """Result of a distillation.

    Attributes:
        folder: the run folder, with `dataset.parquet`, `report.json` and the training in `student/`.
        export: folder of the student.
        metrics: last training loss, and KL on held-out responses.
        report: counts of rows and demonstrations, as in `report.json`.
    """

    folder: Path
    export: Path
    metrics: Mapping[str, float]
    report: dict[str, Any]

    def lines(self) -> list[str]:
        """Return the result in words."""
        report = self.report
        leaks = ", ".join(f"{count} {reason}" for reason, count in report["leaks"].items()) or "none"
        shown = ", ".join(f"{count} with {number}" for number, count in report["shown"].items())
        lines = [f"responses: {report['responses']} of {report['read']} rows; demonstrations: {shown}"]
        lines += [f"left out: {count} rows: {reason}" for reason, count in report["rejected"].items()]
        lines.append(f"skipped as leaks: {leaks}; as repeated texts: {report['repeated']}")
        if report["dropped"]:
            lines.append(f"dropped as farthest, over teacher.max_context_tokens: {report['dropped']} demonstrations")
        if report["short"]:
            lines.append(f"with fewer demonstrations than requested, because there are no more: {report['short']} prompts")
        measured = ", ".join(f"{name.rpartition('/')[2]} {value:.4f}" for name, value in self.metrics.items())
        return [*lines, f"KL per response token: {measured}", f"student: {self.export}"]


def check_distillation(config: ICLDistillConfig) -> str:
    """Check the configuration without reading data, and return the plan in words.

    Raises:
        UserError: no tokenizer, or no chat template where one is needed; no tokens left for an answer; an encoder's pooling is
            unknown; an unusable rollout engine.
    """
    if config.teacher.responses == "sampled":
        check_generator(config.generate, config.pipeline.address, [config.model])
    load_context_tokenizer(config.model, config.context.layout)
    check_encoder(config.teacher)
    teacher = config.teacher
    more = [f"{teacher.demonstrations} demonstrations ({teacher.selection})"] if teacher.demonstrations else []
    more += ["an instruction"] if teacher.instruction is not None else []
    kept = config.train.vocabulary
    return "\n".join(
        [
            f"run: {config.run.folder}, seed {config.run.seed}",
            f"prompts: {config.data.path}; demonstrations from {(config.pool or config.data).path}",
            f"teacher: {config.model.path} with {' and '.join(more)}, at most {_budget(config)} tokens; "
            f"responses: {teacher.responses}",
            f"student: the same model without demonstrations; forward KL over {'all' if kept == 'full' else kept} tokens",
        ]
    )


def describe_data(config: ICLDistillConfig) -> Iterator[str]:
    """Read all rows, and yield counts, formats and columns in words; errors as `describe_pool`."""
    yield describe_pool(config.data, answered=_answered(config))
    if config.pool is not None:
        yield describe_pool(config.pool)


def _answered(config: ICLDistillConfig) -> bool:
    """Return True if rows need a response: as demonstrations of others, or as the teacher's."""
    return (config.pool is None and config.teacher.demonstrations > 0) or config.teacher.responses == "given"


def distill_context(config: ICLDistillConfig) -> DistillResult:
    """Build the data and train the student, or resume an interrupted run.

    Raises:
        UserError: an invalid configuration or dataset; fewer examples than demonstrations; a prompt that alone exceeds the
            teacher's context.
        ActorLostError: a process exceeded its restarts.
    """
    from rayrlhf.actors.connection import connected
    from rayrlhf.observe.live import LiveView
    from rayrlhf.tuning.train_model import train_distillation

    check_distillation(config)
    folder = config.run.folder
    view = LiveView(f"rayrlhf icl distill {config.run.name}", live=False)
    compare = partial(stored_differences, ICLDistillConfig, may_change=lambda key: key.startswith(FREE))
    with open_run(folder, dump_config(config), compare, folders=()), ExitStack() as stack:
        with view.wait("choosing the demonstrations"):
            questions = _questions(config, folder)
        answers = questions
        if config.teacher.responses == "sampled":
            stack.enter_context(connected(config.pipeline.address))
            answers = PartFolder(folder / "answers")
            model = config.model.model_copy(update={"lora": None})
            plan = answer_plan(config, "teacher", model, config.teacher.temperature)
            done = PartProgress(view).rows("teacher answers", questions.facts()["rows"])
            answer_questions(config, plan, questions, answers, done)
        _write_dataset(config, answers, folder / DATASET)
        report = _report(config, questions, answers)
        write_atomically(folder / REPORT, json.dumps(report, indent=1) + "\n")
        view.stop()
        result = train_distillation(student_config(config))
    return DistillResult(folder, result.export, result.metrics, report)


def student_config(config: ICLDistillConfig) -> DistillationConfig:
    """Return the configuration of the training."""
    dataset = SupervisedDatasetSection(path=str(config.run.folder / DATASET), format="prompt-completion")
    chat = config.context.layout != "text"
    return DistillationConfig(
        run=TuningRunSection(name=STUDENT, root=config.run.folder, seed=config.run.seed),
        model=config.model,
        data=DistillationDataSection(
            train=dataset,
            evaluation_share=config.evaluation_share,
            chat=chat,
            max_length=_budget(config) + config.generate.max_new_tokens + END_TOKENS,
            overlong="drop",
            invalid="drop",
        ),
        train=config.train,
        evaluation=config.evaluation,
        checkpoint=config.checkpoint,
        workers=config.workers,
    )


def _questions(config: ICLDistillConfig, folder: Path) -> PartFolder:
    """Write the teacher's contexts, unless they exist."""
    import pyarrow as pa

    questions = PartFolder(folder / "questions")
    if questions.sealed:
        return questions
    size = config.pipeline.rows_per_part
    rows = ingest_examples(config.data, folder / "intake" / "prompts", size, answered=_answered(config))
    targets = pool = list(chain.from_iterable(read_examples(config.data, rows)))
    if config.pool is not None:
        pool_rows = ingest_examples(config.pool, folder / "intake" / "pool", size)
        pool = list(chain.from_iterable(read_examples(config.pool, pool_rows)))
    teacher, counts = config.teacher, ChoiceCounts()
    source = config.pool or config.data
    require_pool(len(pool) - (config.pool is None), teacher.demonstrations, source.path)
    selection = {name: getattr(teacher, name) for name in SelectionSection.model_fields}
    shots = ShotsSection(counts=[teacher.demonstrations], seeds=1, **selection)
    opening = "\n\n".join(text for text in (config.data.system_prompt, teacher.instruction) if text is not None) or None
    tokenizer = load_context_tokenizer(config.model, config.context.layout)
    builder = QuestionBuilder(shots, config.context, opening, tokenizer, _budget(config))
    rankers = make_rankers(teacher, targets, pool, config.run.seed, by_task=source.task_field is not None)
    made = builder.rows(targets, pool, rankers, counts)
    written = [row | {"row": number, "columns": "{}"} for number, row in enumerate(made)]
    for part, start in enumerate(range(0, len(written), size)):
        questions.write(part, pa.Table.from_pylist(written[start : start + size], schema=question_schema()))
    intake = {name: rows.facts()[name] for name in ("read", "rejected")}
    chosen = {"leaks": dict(counts.leaks), "repeated": counts.repeated, "short": counts.short}
    questions.seal({"rows": len(written)} | intake | chosen)
    return questions


def _write_dataset(config: ICLDistillConfig, answers: PartFolder, path: Path) -> None:
    """Write the columns of SFT and `context`; the same parts give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind: Any = pa.string() if config.context.layout == "text" else messages_type()
    schema = pa.schema([("prompt", kind), ("context", kind), ("completion", kind)])
    with file_atomically(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for table in answers.tables():
            writer.write_table(pa.Table.from_pylist(list(_samples(config, table.to_pylist())), schema=schema))


def _samples(config: ICLDistillConfig, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    form = TextForm(config.context.question, config.context.separator)
    response = "text" if config.teacher.responses == "sampled" else "answer"
    for row in rows:
        if config.context.layout == "text":
            prompt = as_text([], row["question"], form, config.data.system_prompt)
            yield {"prompt": prompt, "context": row["prompt"], "completion": row[response]}
            continue
        turns = as_messages([], row["question"], "turns", form, config.data.system_prompt)
        answer: list[Message] = [{"role": "assistant", "content": row[response]}]
        yield {"prompt": turns, "context": json.loads(row["messages"]), "completion": answer}


def _report(config: ICLDistillConfig, questions: PartFolder, answers: PartFolder) -> dict[str, Any]:
    facts = questions.facts()
    shown: Counter[int] = Counter()
    dropped = 0
    for row in questions.rows(["shown", "dropped"]):
        shown[row["shown"]] += 1
        dropped += row["dropped"]
    report = {"read": facts["read"], "responses": shown.total(), "rejected": facts["rejected"], "dropped": dropped}
    report |= {"shown": {str(number): shown[number] for number in sorted(shown)}}
    if config.teacher.responses == "sampled":
        report["unfinished"] = sum(row["finish"] == "length" for row in answers.rows(["finish"]))
    return report | {name: facts[name] for name in ("leaks", "repeated", "short")}


def _budget(config: ICLDistillConfig) -> int:
    """Return the token budget of a context, limited by the model's positions."""
    from rayrlhf.models.load import load_architecture

    positions = getattr(load_architecture(config.model), "max_position_embeddings", None)
    budget, answer = config.teacher.max_context_tokens, config.generate.max_new_tokens
    if positions is None:
        return budget
    if positions <= answer + END_TOKENS + 1:
        raise UserError(
            f"generate.max_new_tokens {answer}: the model's context has {positions} tokens, which leaves no tokens for a prompt"
        )
    return min(budget, int(positions) - answer - END_TOKENS)
