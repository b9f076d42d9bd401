"""Objectives of PPO: policy surrogate, clipped value loss, and their sum on a shared trunk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rayrlhf.algorithms.kl import kl_loss
from rayrlhf.algorithms.losses import TokenLoss, clipped_value_loss
from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.algorithms.policy_loss_registry import token_policy_loss
from rayrlhf.algorithms.policy_losses import LossInputs, aggregated, bounded_ratio
from rayrlhf.config.algorithm import KlSection, ValueLossSection
from rayrlhf.config.policy_loss import PolicyLossSection, PPOLossSection
from rayrlhf.engines.objectives.base import LossComponent, Objective
from rayrlhf.engines.objectives.supervised import DistillationObjective
from rayrlhf.models.network_io import OutputName
from rayrlhf.observe.metric_names import LOGPROB_GAP, ROUTING_DIFFERENCE


@dataclass(frozen=True)
class PolicyObjective:
    """Policy surrogate plus the configured entropy bonus, KL penalty and importance weights.

    Attributes:
        loss: settings of the surrogate.
        kl: KL penalty; added here only if its placement is "loss".
        temperature: sampling temperature of the rollouts.
        importance: multiply the surrogate by the array `importance_weights` (off-policy correction, TRL 1.16 vLLM correction).
        entropy: report the policy's entropy; always computed if there is a bonus.
        longest: tokens that the loss aggregation `constant` divides a response by, unless `loss` sets a number.
        gap: report the distance to the array `rollout_logprobs`, for steps that do not recompute the old log-probs.
        distillation: divergence from a teacher to add.
        routing: report the share of tokens whose own experts differ from the replayed ones.
    """

    masks: ClassVar[Sequence[str]] = ("action_mask",)
    loss: PolicyLossSection = field(default_factory=PPOLossSection)
    kl: KlSection | None = None
    temperature: float = 1.0
    importance: bool = False
    entropy: bool = True
    longest: int = 1
    gap: bool = False
    distillation: DistillationObjective | None = None
    routing: bool = False

    @property
    def outputs(self) -> frozenset[OutputName]:
        """Log-probs, entropy if it is reported or rewarded, and the teacher's divergence."""
        names: set[OutputName] = {"logprobs"}
        if self.entropy or self.loss.entropy_coefficient:
            names.add("entropy")
        if self.routing:
            names.add("routing")
        return frozenset(names) | (self.distillation.outputs if self.distillation else frozenset())

    def compute(self, outputs: Mapping[str, Tensor], arrays: Mapping[str, Tensor]) -> list[LossComponent]:
        """Evaluate on a micro-batch (see `Objective.compute`)."""
        logprobs, mask = outputs["logprobs"], arrays["action_mask"]
        # Without old log-probs the step's only update starts from the policy that sampled: the ratio is 1.
        arrays = {"old_logprobs": logprobs.detach(), **arrays}
        surrogate = token_policy_loss(self.loss.name, _loss_inputs(logprobs, arrays), self.loss.loss_arguments)
        loss, statistics = surrogate.loss, dict(surrogate.statistics)
        if self.gap:
            statistics[LOGPROB_GAP] = zero_masked(logprobs.detach() - arrays["rollout_logprobs"], mask).abs()
        if self.routing:
            statistics[ROUTING_DIFFERENCE] = zero_masked(outputs["routing"], mask)
        if self.importance:
            loss = loss * zero_masked(arrays["importance_weights"], mask)
        if self.kl is not None and self.kl.placement == "loss" and self.kl.coefficient:
            penalty = kl_loss(logprobs, arrays["ref_logprobs"], mask, self.kl.estimator, self.kl.arguments)
            # The tokens come from an older policy; the ratio corrects the estimate to the current policy's KL.
            weight = bounded_ratio(zero_masked(logprobs.detach() - arrays["old_logprobs"], mask))
            statistics["loss/kl_avg"] = penalty.detach()
            loss = loss + self.kl.coefficient * weight * penalty
        loss_aggregation = self.loss.loss_aggregation
        constant = self.loss.loss_aggregation_length or self.longest
        loss = aggregated(loss, mask, loss_aggregation, constant, arrays.get("prompt_weights"))
        components = [LossComponent("action_mask", 1.0, TokenLoss(loss, statistics), per_response=loss_aggregation != "token")]
        if self.loss.positive_coefficient:
            nll = -zero_masked(logprobs, mask) * zero_masked(arrays["positive_weights"], mask)
            token_loss = TokenLoss(nll, {"loss/positive_avg": nll.detach()})
            components.append(LossComponent("action_mask", self.loss.positive_coefficient, token_loss))
        if self.distillation is not None:
            components += self.distillation.compute(outputs, arrays)
        return [*components, self._bonus(outputs["entropy"], mask)] if "entropy" in outputs else components

    def _bonus(self, entropy: Tensor, mask: Tensor) -> LossComponent:
        """Negative entropy, averaged over tokens regardless of the surrogate's aggregation (as in TRL 1.16)."""
        entropy = zero_masked(entropy, mask)
        coefficient = self.loss.entropy_coefficient
        loss = -entropy if coefficient else torch.zeros_like(entropy)
        return LossComponent("action_mask", coefficient, TokenLoss(loss, {"policy/entropy_avg": entropy.detach()}))


def _loss_inputs(logprobs: Tensor, arrays: Mapping[str, Tensor]) -> LossInputs:
    """Inputs of the policy loss for a micro-batch, all 0 outside the action mask."""
    mask = arrays["action_mask"]

    def masked(name: str) -> Tensor | None:
        return zero_masked(arrays[name], mask) if name in arrays else None

    return LossInputs(
        logprobs=zero_masked(logprobs, mask),
        old_logprobs=zero_masked(arrays["old_logprobs"], mask),
        advantages=zero_masked(arrays["advantages"], mask),
        mask=mask,
        ref_logprobs=masked("ref_logprobs"),
        rollout_logprobs=masked("rollout_logprobs"),
        values=masked("old_values"),
        selected=arrays.get("selected_tokens"),
    )


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


def divergence_beta(objective: Objective) -> float:
    """Return beta of an objective's divergence from a teacher; 0 without one."""
    part: object = objective.policy if isinstance(objective, SharedObjective) else objective
    part = part.distillation if isinstance(part, PolicyObjective) else part
    return part.beta if isinstance(part, DistillationObjective) else 0.0
