"""Stages of a k-curve and of distillation: generate the answers to questions, and score them."""

from collections.abc import Callable
from typing import Any

from rayrlhf.batch_inference.generation import BatchGenerator, GenerationPlan, Response, generator_pool
from rayrlhf.batch_inference.part_pipeline import Limits, Pool, run_pipeline
from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.batch_inference.scoring import BleuScorer, Verifier
from rayrlhf.batch_inference.stage_resources import cluster_resources
from rayrlhf.config.icl import ICLDistillConfig, ICLEvaluateConfig
from rayrlhf.config.model import ModelSection
from rayrlhf.data.words import normalized
from rayrlhf.library_types import ArrowTable


def answer_plan(
    config: ICLEvaluateConfig | ICLDistillConfig, label: str, model: ModelSection, temperature: float = 0.0
) -> GenerationPlan:
    """Return the plan of one answer per question."""
    # The context contains the system prompt already, and plain text must not get a chat template.
    data = config.data.model_copy(update={"system_prompt": None, "chat": config.context.layout != "text"})
    return GenerationPlan(label, model, config.generate, data, config.run.seed, 0, 1, temperature)


def answer_questions(
    config: ICLEvaluateConfig | ICLDistillConfig,
    plan: GenerationPlan,
    questions: PartFolder,
    answers: PartFolder,
    done: Callable[[int], None],
) -> None:
    """Generate the answers, and score them in an evaluation, unless that is done."""
    if answers.sealed:
        return
    resources = cluster_resources(config.pipeline, config.generate, generating=True)
    stages = [generator_pool("answer", AnswerGenerator, plan, resources)]
    if isinstance(config, ICLEvaluateConfig):
        stages.append(Pool("score", AnswerScorer, (config,), 1, resources.scorer_cpus))
    run_pipeline(questions, answers, stages, Limits(config.pipeline.max_restarts, config.pipeline.stall_seconds), done)
    answers.seal({"rows": questions.facts()["rows"]})


def load_context_tokenizer(model: ModelSection, layout: str) -> Any:
    """Load a tokenizer; check its chat template unless contexts are plain text.

    Raises:
        UserError: no tokenizer, or no chat template.
    """
    from rayrlhf.data.templates import require_chat_template
    from rayrlhf.models.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    if layout != "text":
        require_chat_template(tokenizer)
    return tokenizer


class AnswerGenerator:
    """Adds generated answers to a part of questions."""

    def __init__(self, plan: GenerationPlan) -> None:
        """Start the rollout engine."""
        self._generator = BatchGenerator(plan)

    def __call__(self, table: ArrowTable) -> ArrowTable:
        """Return the part with `text`, `finish` and `tokens`."""
        import pyarrow as pa

        answers = [responses[0] for responses in self._generator.generate(table.to_pylist())]
        columns = {
            "text": pa.array([answer.text for answer in answers], pa.string()),
            "finish": pa.array([answer.finish_reason for answer in answers], pa.string()),
            "tokens": pa.array([answer.tokens for answer in answers], pa.int32()),
        }
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table


class AnswerScorer:
    """Adds a score to a part of answers."""

    def __init__(self, config: ICLEvaluateConfig) -> None:
        """Load the metric.

        Raises:
            UserError: a reward function cannot be resolved.
        """
        self._metric = config.metric
        self._bleu = BleuScorer() if config.metric == "bleu" else None
        self._verifier = Verifier(config.reward) if config.reward is not None else None

    def __call__(self, table: ArrowTable) -> ArrowTable:
        """Return the part with `score`."""
        import pyarrow as pa

        return table.append_column("score", pa.array(self.scores(table.to_pylist()), pa.float64()))

    def scores(self, rows: list[dict[str, Any]]) -> list[float]:
        """Return the score of each row's `text` against its `answer`."""
        if self._bleu is not None:
            return [self._bleu.score(row["text"], row["answer"]) for row in rows]
        if self._verifier is not None:
            responses = [Response(row["text"], row["finish"], row["tokens"]) for row in rows]
            return self._verifier.scores([row | {"prompt": row["question"], "messages": None} for row in rows], responses)
        return [float(normalized(row["text"]) == normalized(row["answer"])) for row in rows]
