"""Cross-entropy objective of SFT and of the SFT warm-up before PPO."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rayrlhf.algorithms.losses import TokenLoss
from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.engines.objectives.base import LossComponent
from rayrlhf.models.network import OutputName

CROSS_ENTROPY, CROSS_ENTROPY_ALIAS = "loss/cross_entropy", "loss/imitation"
"""Metric name, and the former name that is still emitted."""


@dataclass(frozen=True)
class CrossEntropyObjective:
    """Mean of -log p over all response tokens of the optimizer step."""

    outputs: ClassVar[frozenset[OutputName]] = frozenset({"logprobs"})
    masks: ClassVar[Sequence[str]] = ("action_mask",)
    temperature: float = 1.0

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate on a micro-batch (see `Objective.compute`)."""
        loss = zero_masked(-outputs["logprobs"], arrays["action_mask"])
        return [
            LossComponent(
                "action_mask", 1.0, TokenLoss(loss, dict.fromkeys((CROSS_ENTROPY, CROSS_ENTROPY_ALIAS), loss.detach()))
            )
        ]
