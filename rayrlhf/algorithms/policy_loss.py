"""The clipped surrogate of PPO (Schulman et al. 2017, equation 7), per token.

Options: a wider upper than lower bound of the ratio (DAPO, Yu et al. 2025, "clip-higher"), and a floor under the objective of
bad actions whose ratio ran away (dual clip, Ye et al. 2020).
"""

import torch
from torch import Tensor

from rayrlhf.algorithms.loss_terms import LossTerms
from rayrlhf.algorithms.masking import zero_masked

MAX_LOG_RATIO = 20.0
"""A ratio beyond e^20 tells nothing more and would overflow to inf, which not even a zero weight makes harmless again."""


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> LossTerms:
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)) with rho = p / p_old.

    Args:
        logprobs: float [B, T], with gradient.
        old_logprobs: float [B, T], of the policy that sampled, by the trainer.
        advantages: float [B, T].
        mask: bool [B, T], the action mask.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.
        dual_clip: for A < 0 the loss is at most -A times this (> 1); None leaves it open.

    Returns:
        Terms with the statistics `loss/policy_avg`, `policy/approxkl_avg` (half the squared log-ratio), `policy/clipfrac_avg`
        (1 where the clipped branch is the larger), `val/ratio`, `ppo/policy/policykl` (old - new log-prob),
        `ppo/policy/advantages_mean`.
    """
    log_ratio = zero_masked(logprobs - old_logprobs, mask)
    advantages = zero_masked(advantages, mask)
    ratio = bounded_ratio(log_ratio)
    loss, clipped = clipped_surrogate(ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return LossTerms(loss, policy_statistics(loss, clipped, ratio, log_ratio, advantages, mask))


def bounded_ratio(log_ratio: Tensor) -> Tensor:
    """e^log_ratio, any shape, of a log-ratio clamped to +-`MAX_LOG_RATIO`."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """The clipped objective, negated, and where the clipped branch is the larger (bool), both [B, T].

    Args:
        ratio: float [B, T], with gradient.
        advantages: float [B, T], 0 behind the mask.
        clip_low: see `clipped_policy_loss`, as the other two.
        clip_high: likewise.
        dual_clip: likewise.
    """
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(free, bounded)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss, bounded > free


def policy_statistics(
    loss: Tensor, clipped: Tensor, ratio: Tensor, log_ratio: Tensor, advantages: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """The statistics that every policy loss reports (see `clipped_policy_loss`), detached, all [B, T].

    Args:
        loss: float [B, T].
        clipped: bool [B, T], where the clip took hold.
        ratio: float [B, T], the one that the loss weighs with.
        log_ratio: float [B, T], of each token by itself, 0 behind the mask.
        advantages: float [B, T], 0 behind the mask.
        mask: bool [B, T], the action mask.
    """
    statistics = {
        "loss/policy_avg": loss,
        "policy/approxkl_avg": 0.5 * log_ratio.square(),
        "policy/clipfrac_avg": clipped.to(loss.dtype),
        "val/ratio": zero_masked(ratio, mask),
        "ppo/policy/policykl": -log_ratio,
        "ppo/policy/advantages_mean": advantages,
    }
    return {name: values.detach() for name, values in statistics.items()}
