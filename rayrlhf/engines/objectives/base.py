"""What a train engine minimises: losses per token with the masks they are averaged over, as plain values that travel to actors.

An objective never divides. It returns terms per token, and the engine divides each by the number of its tokens in the whole
optimizer step, over all micro-batches and ranks; so the gradient does not know how the batch was cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from rayrlhf.algorithms.kl import kl_loss
from rayrlhf.algorithms.losses import TokenLoss
from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.algorithms.policy_losses import (
    DEFAULT_LOSS_AGGREGATION,
    POLICY_LOSSES,
    aggregated,
    bounded_ratio,
    clipped_value_loss,
)
from rayrlhf.config.algorithm import KlSection, PolicyLossSection, ValueLossSection
from rayrlhf.models.network import OutputName

RATIO, POLICY_KL = "val/ratio", "ppo/policy/policykl"
"""Statistics that the ratio guard and early stopping decide on."""


@dataclass(frozen=True, slots=True)
class LossComponent:
    """One summand of the objective.

    Attributes:
        mask: name of the array [B, T] whose True places it is averaged over.
        coefficient: its weight in the objective.
        token_loss: loss and statistics per token [B, T], 0 behind the mask.
        per_response: the loss, but no statistic, is averaged over responses with a True place instead of over True places.
    """

    mask: str
    coefficient: float
    token_loss: TokenLoss
    per_response: bool = False

    @property
    def denominator(self) -> str:
        """Name of what the loss is divided by, see `weighted_loss`."""
        return responses_under(self.mask) if self.per_response else self.mask


class Objective(Protocol):
    """A picklable description of what to minimise."""

    @property
    def outputs(self) -> frozenset[OutputName]:
        """What the network must compute."""
        ...

    @property
    def temperature(self) -> float:
        """Of the distribution that log-probs are taken from: the rollout's."""
        ...

    @property
    def masks(self) -> Sequence[str]:
        """Masks the terms are averaged over, by array name."""
        ...

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate the objective on a micro-batch.

        Args:
            outputs: what the network computed, by the names in `want`, float32 [B, T] with gradient.
            arrays: the arrays of the training batch [B, T] (see `TrainingBatch`).
        """
        ...


def responses_under(mask: str) -> str:
    """Name of the number of responses that have a True place under a mask."""
    return f"responses under {mask}"


@dataclass(frozen=True)
class PolicyObjective:
    """The surrogate, and where configured an entropy bonus, a KL penalty and importance weights.

    Attributes:
        loss: the surrogate's settings.
        kl: the KL penalty; it is part of this objective only where its placement is "loss".
        temperature: the rollout's.
        importance: multiply the surrogate by the array `importance_weights` (sampler correction, TRL 1.16 vLLM correction).
        entropy: report the policy's entropy; computed anyway where there is a bonus.
        longest: tokens that the loss_aggregation `constant` divides a response by, unless the loss's settings give a number.
    """

    loss: PolicyLossSection = field(default_factory=PolicyLossSection)
    kl: KlSection | None = None
    temperature: float = 1.0
    importance: bool = False
    entropy: bool = True
    longest: int = 1

    @property
    def outputs(self) -> frozenset[OutputName]:
        """Log-probs, and entropy where asked for."""
        wanted: set[OutputName] = {"logprobs"}
        if self.entropy or self.loss.entropy_coefficient:
            wanted.add("entropy")
        return frozenset(wanted)

    @property
    def masks(self) -> Sequence[str]:
        """The action mask."""
        return ("action_mask",)

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate on a micro-batch (see `Objective.compute`)."""
        logprobs, mask = outputs["logprobs"], arrays["action_mask"]
        surrogate = POLICY_LOSSES[self.loss.name](
            logprobs,
            arrays["old_logprobs"],
            arrays["advantages"],
            mask,
            clip_low=self.loss.clip_low,
            clip_high=self.loss.clip_high,
            dual_clip=self.loss.dual_clip,
        )
        loss, statistics = surrogate.loss, dict(surrogate.statistics)
        if self.importance:
            loss = loss * zero_masked(arrays["importance_weights"], mask)
        if self.kl is not None and self.kl.placement == "loss" and self.kl.coefficient:
            penalty = kl_loss(logprobs, arrays["ref_logprobs"], mask, self.kl.estimator)
            # The tokens came from an older policy; the ratio makes the estimate one of the present policy's KL.
            weight = bounded_ratio(zero_masked(logprobs.detach() - arrays["old_logprobs"], mask))
            statistics["loss/kl_avg"] = penalty.detach()
            loss = loss + self.kl.coefficient * weight * penalty
        loss_aggregation = self.loss.loss_aggregation or DEFAULT_LOSS_AGGREGATION[self.loss.name]
        loss = aggregated(loss, mask, loss_aggregation, self.loss.loss_aggregation_length or self.longest)
        components = [LossComponent("action_mask", 1.0, TokenLoss(loss, statistics), per_response=loss_aggregation != "token")]
        return [*components, self._bonus(outputs["entropy"], mask)] if "entropy" in outputs else components

    def _bonus(self, entropy: Tensor, mask: Tensor) -> LossComponent:
        """Minus the entropy; it is a mean over tokens whatever the surrogate is divided by (so is TRL 1.16's)."""
        entropy = zero_masked(entropy, mask)
        coefficient = self.loss.entropy_coefficient
        loss = -entropy if coefficient else torch.zeros_like(entropy)
        return LossComponent("action_mask", coefficient, TokenLoss(loss, {"policy/entropy_avg": entropy.detach()}))


@dataclass(frozen=True)
class ValueObjective:
    """The critic's clipped squared error times its coefficient."""

    loss: ValueLossSection = field(default_factory=ValueLossSection)
    temperature: float = 1.0

    @property
    def outputs(self) -> frozenset[OutputName]:
        """Values."""
        return frozenset({"values"})

    @property
    def masks(self) -> Sequence[str]:
        """The value mask."""
        return ("value_mask",)

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate on a micro-batch (see `Objective.compute`)."""
        components = clipped_value_loss(
            outputs["values"], arrays["old_values"], arrays["returns"], arrays["value_mask"], clip=self.loss.clip
        )
        return [LossComponent("value_mask", self.loss.coefficient, components)]


@dataclass(frozen=True)
class SharedObjective:
    """Policy and critic on one trunk: both objectives are added, and the critic's gradient moves the policy's trunk too."""

    policy: PolicyObjective
    value: ValueObjective

    @property
    def outputs(self) -> frozenset[OutputName]:
        """What either part wants."""
        return self.policy.outputs | self.value.outputs

    @property
    def temperature(self) -> float:
        """The policy's."""
        return self.policy.temperature

    @property
    def masks(self) -> Sequence[str]:
        """Both masks."""
        return (*self.policy.masks, *self.value.masks)

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate both parts on a micro-batch (see `Objective.compute`)."""
        return self.policy.compute(outputs, arrays) + self.value.compute(outputs, arrays)


@dataclass(frozen=True)
class CrossEntropyObjective:
    """Cross-entropy of given responses: the mean of -log p over all response tokens of the optimizer step."""

    temperature: float = 1.0

    @property
    def outputs(self) -> frozenset[OutputName]:
        """Log-probs."""
        return frozenset({"logprobs"})

    @property
    def masks(self) -> Sequence[str]:
        """The action mask."""
        return ("action_mask",)

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate on a micro-batch (see `Objective.compute`)."""
        loss = zero_masked(-outputs["logprobs"], arrays["action_mask"])
        return [LossComponent("action_mask", 1.0, TokenLoss(loss, {"loss/imitation": loss.detach()}))]


def weighted_loss(components: Sequence[LossComponent], denominators: Mapping[str, float]) -> Tensor:
    """Return the scalar sum of coefficient * (sum of a term's losses) / (its denominator, by `LossComponent.denominator`)."""
    parts = [
        component.coefficient / denominators[component.denominator] * component.token_loss.loss.sum()
        for component in components
    ]
    return torch.stack(parts).sum()
