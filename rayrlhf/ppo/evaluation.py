"""Responses to a fixed held-out prompt set, before, during and after training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rayrlhf.data.records import Prompt, Rollout
from rayrlhf.rewards.score import RewardBatch

OwnReward = Callable[[Sequence[Prompt], Sequence[Rollout]], Sequence[float]]
"""A loop's own reward for an evaluation: (prompts [B], rollouts [B]) -> scores [B]."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation.

    Attributes:
        step: PPO steps done before it.
        prompts: the held-out prompts [B].
        rollouts: one response a prompt [B].
        rewards: scores and parts [B].
    """

    step: int
    prompts: tuple[Prompt, ...]
    rollouts: tuple[Rollout, ...]
    rewards: RewardBatch

    @property
    def mean_score(self) -> float:
        """Mean score over the set."""
        return float(np.mean(self.rewards.scores))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the evaluation."""
        texts = [rollout.text.strip() for rollout in self.rollouts]
        lengths = [len(rollout.response_ids) for rollout in self.rollouts]
        parts = {f"evaluation/{name}": _mean(values) for name, values in self.rewards.parts.items()}
        return parts | {
            "evaluation/score": self.mean_score,
            "evaluation/response_length": float(np.mean(lengths)),
            "evaluation/stopped": float(np.mean([rollout.finish_reason == "stop" for rollout in self.rollouts])),
            "evaluation/distinct": len(set(texts)) / len(texts),
        }


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """Return the mean over the samples that a part applies to, else NaN."""
    present = np.asarray(values)[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")
