"""Value objective: the critic's clipped squared error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from rayrlhf.algorithms.losses import clipped_value_loss
from rayrlhf.config.algorithm import ValueLossSection
from rayrlhf.engines.objectives.base import LossComponent
from rayrlhf.models.network import OutputName


@dataclass(frozen=True)
class ValueObjective:
    """Clipped squared error of the critic times its coefficient."""

    outputs: ClassVar[frozenset[OutputName]] = frozenset({"values"})
    masks: ClassVar[Sequence[str]] = ("value_mask",)
    loss: ValueLossSection = field(default_factory=ValueLossSection)
    temperature: float = 1.0

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate on a micro-batch (see `Objective.compute`)."""
        components = clipped_value_loss(
            outputs["values"], arrays["old_values"], arrays["returns"], arrays["value_mask"], clip=self.loss.clip
        )
        return [LossComponent("value_mask", self.loss.coefficient, components)]
