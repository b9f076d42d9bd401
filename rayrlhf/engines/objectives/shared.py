"""Joint objective of a policy and a critic that share one trunk (`critic.kind: shared`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from rayrlhf.engines.objectives.base import LossComponent
from rayrlhf.engines.objectives.policy import PolicyObjective
from rayrlhf.engines.objectives.value import ValueObjective
from rayrlhf.models.network import OutputName


@dataclass(frozen=True)
class SharedObjective:
    """Sum of policy and value objectives; the critic's gradient moves the shared trunk too."""

    policy: PolicyObjective
    value: ValueObjective

    @property
    def outputs(self) -> frozenset[OutputName]:
        """Outputs of both parts."""
        return self.policy.outputs | self.value.outputs

    @property
    def temperature(self) -> float:
        """Temperature of the policy objective."""
        return self.policy.temperature

    @property
    def masks(self) -> Sequence[str]:
        """Both masks."""
        return (*self.policy.masks, *self.value.masks)

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate both parts on a micro-batch (see `Objective.compute`)."""
        return self.policy.compute(outputs, arrays) + self.value.compute(outputs, arrays)
