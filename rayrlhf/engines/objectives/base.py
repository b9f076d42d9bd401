"""Objective protocol: loss components per token, with the mask that each is averaged over.

An objective is a picklable value, sent to the train actors. It never divides: the engine divides each component by its number
of tokens in the whole optimizer step, over all micro-batches and ranks. The gradient is thus independent of how the batch is
cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rayrlhf.algorithms.losses import TokenLoss
from rayrlhf.models.network_io import OutputName

RATIO, POLICY_KL = "val/ratio", "ppo/policy/policykl"
"""Statistics read by the ratio guard and by early stopping."""


@dataclass(frozen=True, slots=True)
class LossComponent:
    """One summand of the objective.

    Attributes:
        mask: name of the bool array [B, T] whose True positions the loss is averaged over.
        coefficient: weight in the objective.
        token_loss: loss and statistics per token, float32 [B, T], 0 where the mask is False.
        per_response: average the loss, but not the statistics, over responses with a True position instead of over positions.
    """

    mask: str
    coefficient: float
    token_loss: TokenLoss
    per_response: bool = False

    @property
    def denominator(self) -> str:
        """Name of the count that the loss is divided by, see `weighted_loss`."""
        return responses_under(self.mask) if self.per_response else self.mask


class Objective(Protocol):
    """Picklable description of a loss."""

    @property
    def outputs(self) -> frozenset[OutputName]:
        """Outputs that the network must compute."""
        ...

    @property
    def temperature(self) -> float:
        """Sampling temperature of the rollouts, applied to the logits before log-probs."""
        ...

    @property
    def masks(self) -> Sequence[str]:
        """Array names of the masks that the components are averaged over."""
        ...

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate the objective on a micro-batch.

        Args:
            outputs: network outputs by the names in `self.outputs`, float32 [B, T] with gradient.
            arrays: arrays of the training batch [B, T] (see `TrainingBatch`).
        """
        ...


def responses_under(mask: str) -> str:
    """Return the name of the count of responses with a True position in a mask."""
    return f"responses under {mask}"


def weighted_loss(components: Sequence[LossComponent], denominators: Mapping[str, float]) -> Tensor:
    """Sum coefficient * (sum of token losses) / denominator over the components; scalar.

    `denominators` is keyed by `LossComponent.denominator`.
    """
    parts = [
        component.coefficient / denominators[component.denominator] * component.token_loss.loss.sum()
        for component in components
    ]
    return torch.stack(parts).sum()
