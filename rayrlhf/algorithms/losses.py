"""Token loss container, and the losses of critic, reward model and DPO.

`TokenLoss` holds losses per token, never a mean. The caller divides the sum by the token count of the whole optimizer step. A
mean taken here would weight tokens by the micro-batch that they share, so splitting a batch would change the gradient.

The critic's loss is the clipped squared error (OpenAI Baselines' PPO2; TRL 0.11.4 and 1.12.0), per token.

A reward model minimizes the negative log-likelihood of Bradley and Terry (1952), in which the better answer wins with
probability sigmoid(difference of rewards). The margin is that of Llama 2 (Touvron et al. 2023, section 3.2.2). The centering
term, which gives single rewards a meaning and not only their differences, is that of Eisenstein et al. (2023). Both are TRL
1.16 `RewardTrainer`'s.

DPO classifies pairs with the log-ratio to a reference as the reward.

`sigmoid` is DPO (Rafailov et al. 2023, eq. 7); with label smoothing it is conservative DPO (Mitchell 2023: a share of the
labels is assumed wrong), and `robust` is its unbiased form (Chowdhury et al. 2024, eq. 11). `ipo` is the squared loss of
Azar et al. (2024, eq. 17) on means per token. `hinge` is that of SLiC (Zhao et al. 2023). `apo_zero` raises the better answer
and lowers the worse one, `apo_down` lowers both, the worse one more (D'Oosterlinck et al. 2024, eq. 7 and 8). All are TRL 1.16
`DPOTrainer`'s.

Three need no reference, and read the log-probs alone. `cpo` is DPO without the reference (Xu et al. 2024, eq. 3); `simpo`
takes means per token and a margin (Meng et al. 2024, eq. 6); `orpo` takes the odds of the mean probabilities (Hong et al. 2024,
eq. 7). `cpo` and `orpo` add the negative log-likelihood of the better answer.

KTO reads single answers with a label. An answer's log-ratio is compared with the KL of the policy from the reference, estimated
on answers of other prompts and without gradient (Ethayarajh et al. 2024, eq. 7 and 8; TRL 1.16 `KTOTrainer`).

A process reward model classifies the steps of a response as right or wrong (Lightman et al. 2023). Its one logit is the
difference of the two that TRL 1.8's `PRMTrainer` has, so the loss is the same.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from rayrlhf.algorithms.masking import zero_masked


@dataclass(frozen=True)
class TokenLoss:
    """Loss and statistics per token, before reduction.

    Attributes:
        loss: float [B, T] with gradient; 0, without gradient, where masked.
        statistics: metric name -> float [B, T], detached, 0 where masked. The metric is the sum over the optimizer step's
            tokens divided by their number.
    """

    loss: Tensor
    statistics: dict[str, Tensor]

    def sums(self) -> dict[str, Tensor]:
        """Return the scalar sum of every statistic.

        Add the sums over micro-batches and ranks, then divide by the token count.
        """
        return {name: values.sum() for name, values in self.statistics.items()}


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> TokenLoss:
    """Return 1/2 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2).

    Args:
        values: float [B, T], with gradient.
        old_values: float [B, T], at the time of the rollout.
        returns: float [B, T].
        mask: bool [B, T], the value mask.
        clip: c, distance from the old value beyond which the gradient stops; None takes the plain squared error.

    Returns:
        The token loss, before any coefficient, with the statistics `loss/value_avg`, `val/clipfrac_avg` (1 where the clipped
        branch is the larger), `ppo/val/error` (the squared error without the half) and `ppo/val/vpred` (V).
    """
    values, old_values, returns = (zero_masked(tensor, mask) for tensor in (values, old_values, returns))
    free = (values - returns).square()
    # The value is clipped, not its difference: V_old + (V - V_old) is not V to the last bit.
    clipped = free if clip is None else (values.clamp(old_values - clip, old_values + clip) - returns).square()
    loss = 0.5 * torch.maximum(free, clipped)
    statistics = {
        "loss/value_avg": loss,
        "val/clipfrac_avg": (clipped > free).to(loss.dtype),
        "ppo/val/error": free,
        "ppo/val/vpred": values,
    }
    return TokenLoss(loss, {name: tensor.detach() for name, tensor in statistics.items()})


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Return -log sigmoid(chosen - rejected - margin), per pair.

    Args:
        chosen: float [B], reward of the better answer.
        rejected: float [B], reward of the worse one.
        margin: float [B], required difference of the rewards; 0 if None.

    Returns:
        Float [B], nats; finite for any finite rewards.
    """
    difference = chosen - rejected
    return -logsigmoid(difference if margin is None else difference - margin)


def centering_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return (chosen + rejected)^2, per pair: float [B], before any coefficient.

    TRL's `center_rewards_coefficient` multiplies it.
    """
    return (chosen + rejected).square()


def preference_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, *, center_coefficient: float = 0.0
) -> TokenLoss:
    """Return the Bradley-Terry loss plus `center_coefficient` times the centering term.

    Args:
        chosen: float [B], with gradient.
        rejected: float [B], with gradient.
        margin: float [B]; 0 if None.
        center_coefficient: weight of the centering term; TRL suggests 0.01.

    Returns:
        The loss per pair, [B]. Statistics under TRL's names: `accuracy` (1 where the better answer has the higher reward; equal
        rewards count as wrong), `margin` (chosen - rejected) and `mean_reward`; also `loss/bradley_terry`, and `loss/centering`
        before its coefficient.
    """
    likelihood = bradley_terry_loss(chosen, rejected, margin)
    centering = centering_loss(chosen, rejected)
    loss = likelihood + center_coefficient * centering if center_coefficient else likelihood
    statistics = {
        "loss/bradley_terry": likelihood,
        "loss/centering": centering,
        "accuracy": (chosen > rejected).to(likelihood.dtype),
        "margin": chosen - rejected,
        "mean_reward": torch.stack([chosen, rejected]).mean(0),
    }
    return TokenLoss(loss, {name: tensor.detach() for name, tensor in statistics.items()})


DirectLoss = Literal["sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down", "simpo", "cpo", "orpo"]
_PER_TOKEN: tuple[DirectLoss, ...] = ("ipo", "simpo", "orpo")
_MOST_CERTAIN = -1e-6
"""Bound on the mean log-prob in an odds ratio, which is infinite at 0."""


def direct_preference_loss(
    log_ratios: Tensor,
    lengths: Tensor,
    *,
    loss: DirectLoss = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    margin: float = 0.5,
) -> TokenLoss:
    """Return the loss of pairs from the log-ratios of both answers.

    Args:
        log_ratios: float [B, 2], log policy - log reference, summed over an answer's tokens; the better answer first. Without
            a reference it is the log-prob.
        lengths: [B, 2], tokens of the answers; `ipo`, `simpo` and `orpo` divide by them.
        loss: see the module.
        beta: strength of the KL constraint to the reference; tau of `ipo`; scale of the reward of `simpo` and `cpo`; weight of
            `orpo`'s odds ratio.
        label_smoothing: share of the labels assumed wrong, in [0, 0.5); read by `sigmoid`, `robust`, `simpo` and `cpo`.
        margin: gamma of `simpo`, by which the better reward should exceed the worse one.

    Returns:
        The loss per pair, [B]. Statistics: `loss/direct_preference`, `accuracy` (1 where the better answer has the higher
        reward), `margin` (of the rewards), `reward_chosen` and `reward_rejected`, where a reward is beta times the log-ratio,
        per token for `simpo` and `orpo`.
    """
    values = log_ratios / lengths.clamp(min=1) if loss in _PER_TOKEN else log_ratios
    losses = _pair_losses(values[:, 0], values[:, 1], loss, beta, label_smoothing, margin)
    rewards = beta * (log_ratios if loss == "ipo" else values).detach()
    chosen, rejected = rewards.unbind(1)
    statistics = {
        "loss/direct_preference": losses.detach(),
        "accuracy": (chosen > rejected).to(torch.float32),
        "margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    return TokenLoss(losses, statistics)


def _pair_losses(
    chosen: Tensor, rejected: Tensor, loss: DirectLoss, beta: float, label_smoothing: float, margin: float
) -> Tensor:
    gap = chosen - rejected
    match loss:
        case "ipo":
            return (gap - 1 / (2 * beta)).square()
        case "hinge":
            return (1 - beta * gap).relu()
        case "apo_zero":
            return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
        case "apo_down":
            return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * gap)
        case "orpo":
            return -beta * logsigmoid(gap - _log1mexp(chosen) + _log1mexp(rejected))
    logits = beta * gap - margin if loss == "simpo" else beta * gap
    right, wrong = -logsigmoid(logits), -logsigmoid(-logits)
    if loss == "robust":
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def _log1mexp(logprobs: Tensor) -> Tensor:
    """Return log(1 - e^x) for x < 0."""
    return torch.log(-torch.expm1(logprobs.clamp(max=_MOST_CERTAIN)))


def unpaired_preference_loss(
    log_ratios: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> TokenLoss:
    """Return KTO's loss of single answers.

    It is w (1 - sigmoid(beta (log-ratio - kl))) for a desirable answer, and w (1 - sigmoid(beta (kl - log-ratio))) for another.

    Args:
        log_ratios: float [B], log policy - log reference, summed over an answer's tokens.
        desirable: bool [B], the labels.
        kl: float [B], KL of the policy from the reference in nats per answer, without gradient.
        beta: scale of the log-ratio.
        desirable_weight: w of desirable answers.
        undesirable_weight: w of the others.

    Returns:
        The loss per answer, [B]. Statistics: `loss/kto`, `accuracy` (1 where the log-ratio is above the KL for a desirable
        answer, and not above it for another), `batch_kl`.
    """
    gap = log_ratios - kl.detach()
    losses = torch.where(
        desirable, desirable_weight * torch.sigmoid(-beta * gap), undesirable_weight * torch.sigmoid(beta * gap)
    )
    accuracy = ((gap > 0) == desirable).to(torch.float32)
    return TokenLoss(losses, {"loss/kto": losses.detach(), "accuracy": accuracy.detach(), "batch_kl": kl.detach()})


def step_loss(logits: Tensor, right: Tensor, mask: Tensor) -> TokenLoss:
    """Return the cross-entropy of the labels of steps.

    It is -log sigmoid(z) of a right step and -log sigmoid(-z) of a wrong one.

    Args:
        logits: float [B, T], z, the log-odds that the step which ends here is right.
        right: bool [B, T], the labels.
        mask: bool [B, T], True at the last token of each step.

    Returns:
        The loss per step. Statistics: `loss/steps`, and `accuracy` (1 where the sign of z is that of the label).
    """
    labels = right.to(logits.dtype)
    losses = zero_masked(binary_cross_entropy_with_logits(zero_masked(logits, mask), labels, reduction="none"), mask)
    accuracy = zero_masked(((logits > 0) == right).to(logits.dtype), mask)
    return TokenLoss(losses, {"loss/steps": losses.detach(), "accuracy": accuracy})
