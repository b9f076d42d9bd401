"""Objectives of preference pairs: Bradley-Terry for reward models, DPO for policies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rayrlhf.algorithms.losses import DirectLoss, TokenLoss, direct_preference_loss, preference_loss
from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.engines.objectives.base import LossComponent
from rayrlhf.engines.train.supervised_batches import MARGIN, PAIR_MASK, REFERENCE
from rayrlhf.models.network import OutputName


@dataclass(frozen=True)
class PreferenceObjective:
    """Bradley-Terry loss with margin and centering (see `rayrlhf.algorithms.losses`), averaged over pairs.

    Rows 2i and 2i + 1 of a batch are the chosen and the rejected response of pair i (see
    `rayrlhf.engines.train.supervised_batches`).
    """

    outputs: ClassVar[frozenset[OutputName]] = frozenset({"values"})
    """The value after the last token is the reward."""
    masks: ClassVar[Sequence[str]] = (PAIR_MASK,)
    """One True position per pair."""
    center_coefficient: float = 0.0
    temperature: float = 1.0

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate on a micro-batch of whole pairs (see `Objective.compute`); losses are [pairs, 1]."""
        chosen, rejected = outputs["values"].view(-1, 2).unbind(1)
        pairs = preference_loss(chosen, rejected, arrays[MARGIN].view(-1, 2)[:, 0], center_coefficient=self.center_coefficient)
        statistics = {name: values[:, None] for name, values in pairs.statistics.items()}
        return [LossComponent(PAIR_MASK, 1.0, TokenLoss(pairs.loss[:, None], statistics))]


@dataclass(frozen=True)
class DirectPreferenceObjective:
    """DPO loss of `rayrlhf.algorithms.losses`, averaged over the pairs of the optimizer step."""

    outputs: ClassVar[frozenset[OutputName]] = frozenset({"logprobs"})
    masks: ClassVar[Sequence[str]] = ("action_mask", PAIR_MASK)
    """Masks of the log-probs, and of the pairs that the loss is averaged over."""
    loss: DirectLoss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    temperature: float = 1.0

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate on a micro-batch of whole pairs (see `Objective.compute`); losses are [pairs, 1]."""
        mask = arrays["action_mask"]
        sums = zero_masked(outputs["logprobs"], mask).sum(1)
        pairs = direct_preference_loss(
            (sums - arrays[REFERENCE][:, 0]).view(-1, 2),
            mask.sum(1).view(-1, 2),
            loss=self.loss,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
        statistics = {name: values[:, None] for name, values in pairs.statistics.items()}
        return [LossComponent(PAIR_MASK, 1.0, TokenLoss(pairs.loss[:, None], statistics))]
