"""Answers to a fixed held-out prompt set, before, during and after training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayrlhf.data.records import Prompt, Rollout
from rayrlhf.rewards.score import RewardBatch


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation.

    Attributes:
        step: policy updates done before it.
        prompts: the held-out prompts [B].
        rollouts: one answer a prompt [B].
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
        """What goes to the metrics sink."""
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
    """Mean over the samples that a part applies to; NaN where it applies to none."""
    present = np.asarray(values)[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")
