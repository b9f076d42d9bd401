"""The stages of a k-curve over part files: a model answers the questions, then the answers are scored."""

from typing import Any

from rayrlhf.batch_inference.bleu import BleuScorer
from rayrlhf.batch_inference.sampling import Response, SamplingPlan
from rayrlhf.batch_inference.verification import Verifier
from rayrlhf.config.icl import ICLEvaluateConfig
from rayrlhf.demonstrations.example import normalized


class Answerer:
    """Adds a model's answers to a part of questions."""

    def __init__(self, plan: SamplingPlan) -> None:
        """Start the model."""
        from rayrlhf.batch_inference.sampling import Sampler

        self._sampler = Sampler(plan)

    def __call__(self, table: Any) -> Any:
        """Return the part with `text`, `finish` and `tokens`."""
        import pyarrow as pa

        answers = [responses[0] for responses in self._sampler.answer(table.to_pylist())]
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
        """Load what scores.

        Raises:
            UserError: a reward function cannot be resolved.
        """
        self._metric = config.metric
        self._bleu = BleuScorer() if config.metric == "bleu" else None
        self._verifier = Verifier(config.reward) if config.reward is not None else None

    def __call__(self, table: Any) -> Any:
        """Return the part with `score`."""
        import pyarrow as pa

        return table.append_column("score", pa.array(self.scores(table.to_pylist()), pa.float64()))

    def scores(self, rows: list[dict[str, Any]]) -> list[float]:
        """Return the score of each row's `text` against its `answer`."""
        if self._bleu is not None:
            return [self._bleu.score(row["text"], row["answer"]) for row in rows]
        if self._verifier is not None:
            responses = [Response(row["text"], row["finish"], row["tokens"]) for row in rows]
            return self._verifier.scores([row | {"prompt": row["question"]} for row in rows], responses)
        return [float(normalized(row["text"]) == normalized(row["answer"])) for row in rows]
