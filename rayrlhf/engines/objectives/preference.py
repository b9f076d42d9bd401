"""Objectives of reward models (Bradley-Terry, steps) and of preferences (DPO, KTO)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rayrlhf.algorithms.losses import (
    DirectLoss,
    TokenLoss,
    direct_preference_loss,
    preference_loss,
    step_loss,
    unpaired_preference_loss,
)
from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.algorithms.opponents import nash_md_loss
from rayrlhf.engines.objectives.base import LossComponent
from rayrlhf.engines.train.supervised_batches import (
    BATCH_KL,
    CHOSEN_MASK,
    DESIRABLE,
    MARGIN,
    OPPONENT,
    PAIR_MASK,
    PREFERENCE,
    REFERENCE,
    REFERENCE_TOKENS,
    STEP_MASK,
    STEP_RIGHT,
)
from rayrlhf.models.network_io import OutputName

NLL = "loss/nll"
"""Metric of the negative log-likelihood of the better answers."""
EXPLORATION = "loss/exploration"
"""Metric of the log-prob of the reference's responses (XPO), before its coefficient."""


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
class StepObjective:
    """Cross-entropy of the labels of steps (see `rayrlhf.algorithms.losses`).

    It is averaged over the steps of all responses of the optimizer step.
    """

    outputs: ClassVar[frozenset[OutputName]] = frozenset({"values"})
    """The value after a step's last token is its logit."""
    masks: ClassVar[Sequence[str]] = (STEP_MASK,)
    temperature: float = 1.0

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate on a micro-batch (see `Objective.compute`)."""
        return [LossComponent(STEP_MASK, 1.0, step_loss(outputs["values"], arrays[STEP_RIGHT], arrays[STEP_MASK]))]


@dataclass(frozen=True)
class DirectPreferenceObjective:
    """Pair loss of `rayrlhf.algorithms.losses`, averaged over the pairs of the optimizer step.

    `nll` times the negative log-likelihood of the better answers is added, averaged over their tokens, and `exploration` times
    the log-prob of each pair's answer of the reference (XPO).
    """

    outputs: ClassVar[frozenset[OutputName]] = frozenset({"logprobs"})
    loss: DirectLoss = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    margin: float = 0.5
    nll: float = 0.0
    exploration: float = 0.0
    temperature: float = 1.0

    @property
    def masks(self) -> Sequence[str]:
        """Masks of the log-probs, of the pairs, and of the better answers' tokens."""
        return ("action_mask", PAIR_MASK, *((CHOSEN_MASK,) if self.nll else ()))

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
            margin=self.margin,
        )
        statistics = {name: values[:, None] for name, values in pairs.statistics.items()}
        components = [LossComponent(PAIR_MASK, 1.0, TokenLoss(pairs.loss[:, None], statistics))]
        if self.exploration:
            explored = (sums * arrays[OPPONENT][:, 0]).view(-1, 2).sum(1, keepdim=True)
            components.append(LossComponent(PAIR_MASK, self.exploration, TokenLoss(explored, {EXPLORATION: explored.detach()})))
        if self.nll:
            likelihood = zero_masked(-outputs["logprobs"], arrays[CHOSEN_MASK])
            components.append(LossComponent(CHOSEN_MASK, self.nll, TokenLoss(likelihood, {NLL: likelihood.detach()})))
        return components


@dataclass(frozen=True)
class NashObjective:
    """Nash-MD loss of `rayrlhf.algorithms.opponents`, averaged over the responses of the optimizer step."""

    outputs: ClassVar[frozenset[OutputName]] = frozenset({"logprobs"})
    masks: ClassVar[Sequence[str]] = ("action_mask", PAIR_MASK)
    beta: float = 0.1
    temperature: float = 1.0

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate on a micro-batch (see `Objective.compute`); losses are [responses, 1]."""
        answers = nash_md_loss(
            outputs["logprobs"],
            arrays[REFERENCE_TOKENS],
            arrays[PREFERENCE][:, 0],
            arrays["action_mask"],
            beta=self.beta,
        )
        statistics = {name: values[:, None] for name, values in answers.statistics.items()}
        return [LossComponent(PAIR_MASK, 1.0, TokenLoss(answers.loss[:, None], statistics))]


@dataclass(frozen=True)
class UnpairedPreferenceObjective:
    """KTO loss of `rayrlhf.algorithms.losses`, averaged over the answers of the optimizer step."""

    outputs: ClassVar[frozenset[OutputName]] = frozenset({"logprobs"})
    masks: ClassVar[Sequence[str]] = ("action_mask", PAIR_MASK)
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    temperature: float = 1.0

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate on a micro-batch (see `Objective.compute`); losses are [answers, 1]."""
        sums = zero_masked(outputs["logprobs"], arrays["action_mask"]).sum(1)
        answers = unpaired_preference_loss(
            sums - arrays[REFERENCE][:, 0],
            arrays[DESIRABLE][:, 0],
            arrays[BATCH_KL][:, 0],
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        statistics = {name: values[:, None] for name, values in answers.statistics.items()}
        return [LossComponent(PAIR_MASK, 1.0, TokenLoss(answers.loss[:, None], statistics))]
