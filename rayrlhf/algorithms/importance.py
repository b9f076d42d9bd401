"""Log-prob mismatch between rollout engine and trainer, and its importance weights.

A small gap after a weight sync proves that the weights arrived. The rest of the gap makes samples slightly off-policy, which a
bounded importance weight corrects (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").

The guards that stop an update take global means, so that all ranks decide the same.
"""

from typing import Literal

import torch
from torch import Tensor

from rayrlhf.algorithms.kl import kl_penalty
from rayrlhf.algorithms.masking import masked_mean, zero_masked
from rayrlhf.algorithms.policy_losses import MAX_LOG_RATIO


def importance_weights(
    trainer_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    mode: Literal["truncate", "mask"] = "truncate",
    level: Literal["token", "sequence"] = "token",
    low: float = 0.0,
    high: float = 3.0,
) -> Tensor:
    """Return bounded weights w = p_trainer / p_rollout that multiply the policy loss.

    Modes and levels are TRL 1.16.0's `token_truncate`, `token_mask`, `sequence_truncate` and `sequence_mask`. Token weights
    have a small bias and little variance. A sequence weight is the product over its tokens: unbiased until it is bounded, and
    out of bounds for nearly all long responses.

    Args:
        trainer_logprobs: float [B, T], by the trainer with the weights that sampled.
        rollout_logprobs: float [B, T], reported by the rollout engine.
        mask: bool [B, T], the action mask.
        mode: `truncate` clamps w to [low, high]; `mask` gives a token or sequence outside it the weight 0.
        level: `token` gives each token its own w, `sequence` all tokens of a response their product.
        low: lower bound.
        high: upper bound.

    Returns:
        Float [B, T], detached. 1 where masked, and 1 (no correction) where a log-prob is NaN.
    """
    log_ratio = zero_masked(trainer_logprobs - rollout_logprobs, mask).detach().nan_to_num(nan=0.0)
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand(log_ratio.shape)
    weights = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    bounded = weights.clamp(low, high)
    if mode == "mask":
        bounded = torch.where(bounded == weights, weights, 0.0)
    return torch.where(mask, bounded, 1.0)


Rejection = Literal["geometric", "product", "outlier"]
REJECTION_BOUNDS: dict[Rejection, tuple[float, float]] = {
    "geometric": (0.99, 1.01),
    "product": (0.5, 2.0),
    "outlier": (1e-4, 100.0),
}
"""Bounds outside which a response is rejected (SkyRL's `geo_mask`, `product_mask` and `outlier_token_is_threshold`)."""


def accepted_responses(
    trainer_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, rejection: Rejection, low: float, high: float
) -> Tensor:
    """Return True for the responses whose probability ratio is within bounds, bool [B].

    `geometric` bounds the geometric mean of the token ratios, at any length; `product` their product, which leaves the
    bounds with length; `outlier` each of them, so that one token outside rejects its response.

    Args:
        trainer_logprobs: float [B, T], by the trainer with the weights that sampled.
        rollout_logprobs: float [B, T], reported by the rollout engine; NaN counts as no gap.
        mask: bool [B, T], the action mask.
        rejection: see above.
        low: lower bound of the ratio.
        high: upper bound.
    """
    log_ratio = zero_masked(trainer_logprobs - rollout_logprobs, mask).detach().double().nan_to_num(nan=0.0)
    if rejection == "outlier":
        measured = log_ratio
    else:
        measured = log_ratio.sum(1, keepdim=True)
        if rejection == "geometric":
            measured = measured / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = measured.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return ((ratio >= low) & (ratio <= high)).all(1)


def weight_statistics(weights: Tensor, unbounded: Tensor, mask: Tensor) -> dict[str, float]:
    """Return metrics of the off-policy correction of a step.

    Args:
        weights: float [B, T], of `importance_weights`.
        unbounded: float [B, T], the same without bounds.
        mask: bool [B, T], the action mask.

    Returns:
        `sampling/importance_sampling_ratio/min`, `/mean` and `/max` of the weights over tokens (TRL 1.16.0's names), and
        `sampling/importance_bounded`, the share of tokens whose weight was bounded.

    Raises:
        ValueError: the mask is False everywhere.
    """
    return {
        "sampling/importance_sampling_ratio/min": weights[mask].min().item(),
        "sampling/importance_sampling_ratio/mean": masked_mean(weights, mask).item(),
        "sampling/importance_sampling_ratio/max": weights[mask].max().item(),
        "sampling/importance_bounded": masked_mean((weights != unbounded).to(weights.dtype), mask).item(),
    }


def mismatch(trainer_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """Return the log-prob gap between rollout engine and trainer, in nats.

    Args:
        trainer_logprobs: float [B, T].
        rollout_logprobs: float [B, T].
        mask: bool [B, T], the tokens to compare: those sampled with the trainer's weights.

    Returns:
        `sampling/sampling_logp_difference/mean` and `/max` of the absolute gap (first two as TRL 1.16.0 defines them), and
        `sampling/kl`, the k3 estimate of KL(rollout || trainer). NaN inside the mask gives NaN.

    Raises:
        ValueError: the mask is False everywhere.
    """
    gap = zero_masked(trainer_logprobs - rollout_logprobs, mask).detach().abs()
    return {
        "sampling/sampling_logp_difference/mean": masked_mean(gap, mask).item(),
        "sampling/sampling_logp_difference/max": gap.max().item(),
        "sampling/kl": masked_mean(kl_penalty(rollout_logprobs, trainer_logprobs, "k3"), mask).item(),
    }


def moved_too_far(policy_kl: float, target: float) -> bool:
    """Return True where the epochs of a step should stop (TRL 0.11.4 `early_stopping`).

    Args:
        policy_kl: `ppo/policy/policykl` of a mini-batch, nats per token; signed, a negative one never stops.
        target: `target_kl`; the margin of 1.5 is TRL's.
    """
    return policy_kl > 1.5 * target


def ratio_exploded(mean_ratio: float, threshold: float) -> bool:
    """Return True where a mini-batch's mean ratio (`val/ratio`) exceeds the threshold.

    This is TRL 0.11.4's `ratio_threshold`.
    """
    return mean_ratio > threshold
