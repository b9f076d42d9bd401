"""`icl evaluate`: scores of models by the number of demonstrations (k-curves).

Questions are written once per model, because templates and context lengths differ, and answered part by part in a pool of
processes. Answers that exist are not generated again. All answers stay in Parquet files, from which the curve is computed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rayrlhf.batch_inference.generation import check_generator
from rayrlhf.batch_inference.parts import PartFolder, merge
from rayrlhf.batch_inference.stage_resources import PartProgress
from rayrlhf.config.icl import ICLEvaluateConfig
from rayrlhf.config.loading.load import dump_config, stored_differences
from rayrlhf.config.model import ModelSection
from rayrlhf.demonstrations.choosing import ChoiceCounts, require_pool
from rayrlhf.demonstrations.example import Example
from rayrlhf.demonstrations.ranking import check_encoder, make_rankers
from rayrlhf.errors import UserError
from rayrlhf.observe.run_folder import open_run
from rayrlhf.pipelines.icl.answering import answer_plan, answer_questions, load_context_tokenizer
from rayrlhf.pipelines.icl.curve import Point, curve
from rayrlhf.pipelines.icl.example_pool import describe_pool, ingest_examples, read_examples
from rayrlhf.pipelines.icl.questions import QuestionBuilder, question_schema
from rayrlhf.rewards.functions import load_functions, required_columns
from rayrlhf.storage.atomic import write_atomically

CURVE, ANSWERS = "curve.json", "answers.parquet"


@dataclass(frozen=True, slots=True)
class CurveResult:
    """Result of an evaluation.

    Attributes:
        folder: the run folder, with `curve.json`, `report.html` and the answers of each model.
    """

    folder: Path
    points: list[Point]

    def lines(self) -> list[str]:
        """Return the curves in words, one line per model and ablation."""
        names = list(dict.fromkeys((point.model, point.ablation) for point in self.points))
        lines = []
        for model, ablation in names:
            own = [point for point in self.points if (point.model, point.ablation) == (model, ablation)]
            figures = "  ".join(f"k={point.k} {point.mean:.3f} [{point.low:.3f}, {point.high:.3f}]" for point in own)
            lines.append(f"{model}{'' if ablation == 'none' else f' ({ablation})'}: {figures}")
        return [*lines, f"report: {self.folder / 'report.html'}"]


def check_evaluation(config: ICLEvaluateConfig) -> str:
    """Check the configuration without reading data, and return the plan in words.

    Raises:
        UserError: no tokenizer, or no chat template where one is needed; an unusable rollout engine.
    """
    check_generator(config.generate, config.pipeline.address, config.models.values())
    for model in config.models.values():
        load_context_tokenizer(model, config.context.layout)
    shots = config.demonstrations
    check_encoder(shots)
    return "\n".join(
        [
            f"run: {config.run.folder}, seed {config.run.seed}",
            f"questions: {config.data.path}; demonstrations from {(config.pool or config.data).path}",
            f"demonstrations: {', '.join(map(str, shots.counts))}; {shots.selection}, {shots.order.replace('_', ' ')}; "
            f"{', '.join(shots.ablations)}; {shots.draws} draws",
            f"models: {', '.join(config.models)}; {config.metric}",
        ]
    )


def describe_data(config: ICLEvaluateConfig) -> Iterator[str]:
    """Read all rows, and yield counts, formats and columns in words; errors as `describe_pool`."""
    yield describe_pool(config.data, needs=_needed_columns(config))
    if config.pool is not None:
        yield describe_pool(config.pool)


def _needed_columns(config: ICLEvaluateConfig) -> dict[str, str]:
    return required_columns(load_functions(config.reward)) if config.reward is not None else {}


def evaluate_curve(config: ICLEvaluateConfig) -> CurveResult:
    """Generate and score the missing answers, and write curve and report.

    Raises:
        UserError: an invalid configuration or dataset; fewer examples than demonstrations; a question that alone exceeds a
            model's context.
        ActorLostError: a process exceeded its restarts.
    """
    from rayrlhf.actors.connection import connected
    from rayrlhf.observe.live import LiveView
    from rayrlhf.pipelines.icl.icl_report import write_curve_report

    check_evaluation(config)
    folder = config.run.folder
    view = LiveView(f"rayrlhf icl evaluate {config.run.name}", live=False)
    compare = partial(stored_differences, ICLEvaluateConfig, may_change=lambda key: key.startswith("pipeline."))
    with open_run(folder, dump_config(config), compare, folders=()):
        with view.wait("reading the examples"):
            question_set = _QuestionSet.read(config, folder)
        for name, model in config.models.items():
            with view.wait(f"writing the questions for {name}"):
                question_set.write_questions(name, model)
        with connected(config.pipeline.address):
            progress = PartProgress(view)
            for name, model in config.models.items():
                questions = PartFolder(folder / "questions" / name)
                done = progress.rows(f"{name} answers", questions.facts()["rows"])
                plan = answer_plan(config, name, model)
                answer_questions(config, plan, questions, PartFolder(folder / "answers" / name), done)
        points = []
        for name in config.models:
            answers = PartFolder(folder / "answers" / name)
            points += curve(name, answers.rows(["ablation", "k", "source", "score", "copying", "shown", "dropped"]))
            merge(answers, folder / f"{name}-{ANSWERS}")
        write_atomically(folder / CURVE, json.dumps([point.as_row() for point in points], indent=1) + "\n")
        write_curve_report(config, points, question_set.leaks(), folder / "report.html")
    return CurveResult(folder, points)


@dataclass(frozen=True, slots=True)
class _QuestionSet:
    """Examples of questions and of demonstrations."""

    config: ICLEvaluateConfig
    folder: Path
    targets: list[Example]
    columns: list[str]
    pool: list[Example]

    @classmethod
    def read(cls, config: ICLEvaluateConfig, folder: Path) -> "_QuestionSet":
        size = config.pipeline.rows_per_part
        rows = ingest_examples(config.data, folder / "intake" / "questions", size, needs=_needed_columns(config))
        targets = list(chain.from_iterable(read_examples(config.data, rows)))
        columns = [row["columns"] for row in rows.rows(["columns"])]
        pool = targets
        if config.pool is not None:
            other = ingest_examples(config.pool, folder / "intake" / "pool", config.pipeline.rows_per_part)
            pool = list(chain.from_iterable(read_examples(config.pool, other)))
        require_pool(len(pool) - (config.pool is None), max(config.demonstrations.counts), (config.pool or config.data).path)
        return cls(config, folder, targets, columns, pool)

    def write_questions(self, name: str, model: ModelSection) -> None:
        """Write the questions for one model, unless they exist."""
        import pyarrow as pa

        folder = PartFolder(self.folder / "questions" / name)
        if folder.sealed:
            return
        counts = ChoiceCounts()
        tokenizer = load_context_tokenizer(model, self.config.context.layout)
        builder = QuestionBuilder(
            self.config.demonstrations, self.config.context, self.config.data.system_prompt, tokenizer, self._budget(model)
        )
        by_task = (self.config.pool or self.config.data).task_field is not None
        shots = self.config.demonstrations
        rankers = make_rankers(shots, self.targets, self.pool, self.config.run.seed, by_task=by_task)
        made = builder.rows(self.targets, self.pool, rankers, counts)
        rows = [row | {"row": number, "columns": self.columns[row["source"]]} for number, row in enumerate(made)]
        size = self.config.pipeline.rows_per_part
        for part, start in enumerate(range(0, len(rows), size)):
            folder.write(part, pa.Table.from_pylist(rows[start : start + size], schema=question_schema()))
        folder.seal({"rows": len(rows), "leaks": dict(counts.leaks), "repeated": counts.repeated, "short": counts.short})

    def leaks(self) -> dict[str, Any]:
        """Return the counts of skipped candidates, which are the same for all models."""
        return PartFolder(self.folder / "questions" / next(iter(self.config.models))).facts()

    def _budget(self, model: ModelSection) -> int:
        from rayrlhf.engines.rollout.common import context_length
        from rayrlhf.models.load import load_architecture

        generate = self.config.generate
        longest = context_length(answer_plan(self.config, "", model).rollout(), load_architecture(model))
        if longest <= generate.max_new_tokens:
            raise UserError(f"generate.max_new_tokens {generate.max_new_tokens}: the model's context has {longest} tokens")
        return int(longest - generate.max_new_tokens)
