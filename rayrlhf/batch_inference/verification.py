"""Reward functions as a verifier: what a response is worth, given its row's other fields."""

import json
from collections.abc import Sequence
from typing import Any

from rayrlhf.batch_inference.sampling import Response
from rayrlhf.config.reward import RewardSection
from rayrlhf.rewards.functions import ScoringBatch, load_functions
from rayrlhf.rewards.score import score_batch


class Verifier:
    """The weighted sum of reward functions."""

    def __init__(self, section: RewardSection) -> None:
        """Resolve the functions.

        Raises:
            UserError: one of them cannot be.
        """
        self._functions = load_functions(section)
        self._timeout_seconds = section.timeout_seconds

    def scores(self, rows: Sequence[dict[str, Any]], responses: Sequence[Response]) -> list[float]:
        """Return the score of one response to each row.

        Raises:
            UserError: a function raised, or returned something that is no finite number.
        """
        fields = [json.loads(row["columns"]) for row in rows]
        names = sorted({name for row in fields for name in row})
        batch = ScoringBatch(
            prompts=[row["prompt"] for row in rows],
            responses=[response.text for response in responses],
            columns={name: [row.get(name) for row in fields] for name in names},
            finish_reasons=[response.finish_reason for response in responses],
        )
        scored = score_batch(self._functions, batch, timeout_seconds=self._timeout_seconds)
        return [float(score) for score in scored.scores]
