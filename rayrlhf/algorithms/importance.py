"""The gap between trainer and sampler: two programs compute the same policy's log-probs, and they differ.

After a weight sync the gap proves that the weights arrived. What remains of it makes the samples slightly off-policy, which a
bounded importance weight corrects (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
"""

from typing import Literal

import torch
from torch import Tensor

from rayrlhf.algorithms.kl import kl_penalty
from rayrlhf.algorithms.masking import masked_mean, zero_masked
from rayrlhf.algorithms.policy_loss import MAX_LOG_RATIO


def importance_weights(
    trainer_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor,
    *,
    mode: Literal["truncate", "mask"] = "truncate",
    low: float = 0.0,
    high: float = 3.0,
) -> Tensor:
    """Token weights w = p_trainer / p_sampler, bounded, to multiply the policy loss by.

    The two modes are TRL 1.16.0's `token_truncate` and `token_mask`.

    Args:
        trainer_logprobs: float [B, T], of the policy that sampled, by the trainer.
        sampler_logprobs: float [B, T], the sampler's own.
        mask: bool [B, T], the action mask.
        mode: `truncate` clamps w to [low, high]; `mask` gives a token outside it the weight 0.
        low: lower bound.
        high: upper bound.

    Returns:
        Float [B, T], detached. 1 behind the mask, and 1 (no correction) where a log-prob is NaN.
    """
    log_ratio = zero_masked(trainer_logprobs - sampler_logprobs, mask).detach().nan_to_num(nan=0.0)
    weights = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if mode == "truncate":
        return weights.clamp(low, high)
    return torch.where((weights >= low) & (weights <= high), weights, torch.zeros_like(weights))


def mismatch(trainer_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's, in nats.

    Args:
        trainer_logprobs: float [B, T].
        sampler_logprobs: float [B, T].
        mask: bool [B, T], the tokens to compare: those sampled with the weights the trainer holds.

    Returns:
        `sampling/sampling_logp_difference/mean` and `/max` of the absolute gap (first two as TRL 1.16.0 defines them), and
        `sampling/kl`, the k3 estimate of KL(sampler || trainer). NaN inside the mask shows as NaN.

    Raises:
        ValueError: the mask is False everywhere.
    """
    gap = zero_masked(trainer_logprobs - sampler_logprobs, mask).detach().abs()
    return {
        "sampling/sampling_logp_difference/mean": masked_mean(gap, mask).item(),
        "sampling/sampling_logp_difference/max": gap.max().item(),
        "sampling/kl": masked_mean(kl_penalty(sampler_logprobs, trainer_logprobs, "k3"), mask).item(),
    }
