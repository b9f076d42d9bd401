"""Objectives of SFT: cross-entropy, and distillation with a divergence from a teacher.

A teacher's outputs are part of the batch: `teacher_hidden` [B, T, H], or `teacher_ids` [B, T, K] and `teacher_logprobs`
[B, T, K + 1]. Where the responses are given, they are computed once before training, so no second model is in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rayrlhf.algorithms.losses import TokenLoss
from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.engines.objectives.base import LossComponent
from rayrlhf.engines.train.supervised_batches import HIDDEN, IDS, LOGPROBS
from rayrlhf.models.network_io import OutputName, TeacherSignal

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


@dataclass(frozen=True)
class DistillationObjective:
    """Generalized Jensen-Shannon divergence, averaged over the response tokens of the optimizer step.

    Attributes:
        beta: 0 is KL(teacher || student), 1 is KL(student || teacher); see `rayrlhf.models.distillation`.
        coefficient: weight in a sum of objectives.
    """

    outputs: ClassVar[frozenset[OutputName]] = frozenset({"divergence"})
    masks: ClassVar[Sequence[str]] = ("action_mask",)
    temperature: float = 1.0
    beta: float = 0.0
    coefficient: float = 1.0

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate on a micro-batch (see `Objective.compute`)."""
        loss = zero_masked(outputs["divergence"], arrays["action_mask"])
        return [LossComponent("action_mask", self.coefficient, TokenLoss(loss, {"loss/distillation": loss.detach()}))]


def teacher_signal(arrays: Mapping[str, Tensor], slots: Tensor, beta: float) -> TeacherSignal:
    """Return the teacher's outputs at `slots`, int64 [N] flat indices into a [B, T] table."""
    flat = {name: arrays[name].flatten(0, 1).index_select(0, slots) for name in (HIDDEN, IDS, LOGPROBS) if name in arrays}
    if HIDDEN in flat:
        return TeacherSignal(hidden=flat[HIDDEN], beta=beta)
    return TeacherSignal(ids=flat[IDS].long(), logprobs=flat[LOGPROBS], beta=beta)
