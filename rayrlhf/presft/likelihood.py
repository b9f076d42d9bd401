"""How likely the tuned model finds a response: the mean log-probability of its tokens, given the prompt."""

from collections.abc import Sequence
from typing import Any

from rayrlhf.config.presft import PairsSection
from rayrlhf.engines.score_engine import FrozenEngine
from rayrlhf.models.load import load_tokenizer
from rayrlhf.presft.prompts import encode_prompts, response_sequences
from rayrlhf.presft.sampling_plan import SamplingPlan

BATCH_TOKENS = 8192
"""Token budget of one forward."""


class LikelihoodEngine:
    """The tuned model, read only."""

    def __init__(self, plan: SamplingPlan, data: PairsSection) -> None:
        """Load the model.

        Raises:
            UserError: it cannot be loaded.
        """
        self._engine = FrozenEngine(plan.model, BATCH_TOKENS)
        self._tokenizer: Any = load_tokenizer(plan.model)
        self._data = data
        self._longest = plan.generate.max_model_length or 10**9

    def mean_logprobs(self, rows: Sequence[dict[str, Any]], responses: Sequence[str]) -> list[float]:
        """Return the mean log-probability per token, in nats, of one response to each row's prompt, at temperature 1."""
        prompts = encode_prompts(
            self._tokenizer,
            self._data,
            [row["prompt"] for row in rows],
            [row["messages"] for row in rows],
            [row["source"] for row in rows],
        )
        sequences = response_sequences(self._tokenizer, prompts, responses, self._longest)
        scores = self._engine.score(sequences, frozenset({"logprobs"}))
        return [float(score.logprobs.mean()) for score in scores if score.logprobs is not None]
