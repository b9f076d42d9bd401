"""The policy losses by name. A new one is a file with such a function and a line here; the critic has a single loss.

The clipped surrogate of PPO (Schulman et al. 2017, equation 7), per token.

Options: a wider upper than lower bound of the ratio (DAPO, Yu et al. 2025, "clip-higher"), and a floor under the objective of
bad actions whose ratio ran away (dual clip, Ye et al. 2020).

GSPO: the clipped surrogate on the ratio of whole responses (Zheng et al. 2025, "Group sequence policy optimization").

The score belongs to the response, so its ratio does too: s = (p(y) / p_old(y))^(1/|y|), the geometric mean of the token ratios.
Either all tokens of a response are clipped or none. Ratios of responses stay much closer to 1 than those of tokens, so the clip
range is narrower: the paper takes 3e-4 below and 4e-4 above.

CISPO: bound the importance weight and keep every token's gradient (MiniMax 2025, "MiniMax-M1", section 3.1).

PPO's clip silences tokens whose ratio left the range, and rare tokens on which a chain of thought turns leave it first. Here
the ratio is a weight without gradient on the log-prob, as in REINFORCE, and the bound only keeps the weight from running away.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from rayrlhf.algorithms.losses import TokenLoss, clipped_value_loss
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
) -> TokenLoss:
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
    return TokenLoss(loss, policy_statistics(loss, clipped, ratio, log_ratio, advantages, mask))


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


def sequence_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual_clip: float | None = None,
) -> TokenLoss:
    """max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)) at each token, s being its response's ratio.

    With loss aggregation `sequence`, the default for this loss, this is equation 5 of the
    paper, and TRL 1.16.0's `importance_sampling_level="sequence"` with `loss_type="grpo"`.

    Args:
        logprobs: float [B, T], with gradient.
        old_logprobs: float [B, T], of the policy that sampled, by the trainer.
        advantages: float [B, T].
        mask: bool [B, T], the action mask.
        clip_low: how far the response's ratio may fall below 1.
        clip_high: how far it may rise above 1.
        dual_clip: see `clipped_policy_loss`.

    Returns:
        Terms with the statistics of `clipped_policy_loss`; `val/ratio` is s.
    """
    log_ratio = zero_masked(logprobs - old_logprobs, mask)
    advantages = zero_masked(advantages, mask)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    ratio = bounded_ratio(log_ratio.sum(1, keepdim=True) / lengths).expand(log_ratio.shape)
    loss, clipped = clipped_surrogate(ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return TokenLoss(loss, policy_statistics(loss, clipped, ratio, log_ratio, advantages, mask))


def bounded_weight_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 4.0,
    dual_clip: float | None = None,
) -> TokenLoss:
    """-min(rho, 1 + clip_high) A log p, the weight detached.

    Args:
        logprobs: float [B, T], with gradient.
        old_logprobs: float [B, T], of the policy that sampled, by the trainer.
        advantages: float [B, T].
        mask: bool [B, T], the action mask.
        clip_low: of no use: the paper leaves the weight open below.
        clip_high: the weight's bound is 1 plus this; TRL 1.16.0's `epsilon_high` is the bound itself, of which 5 is usual.
        dual_clip: of no use, since no ratio runs away.

    Returns:
        Terms with the statistics of `clipped_policy_loss`; `policy/clipfrac_avg` counts the tokens whose weight was bounded and
        whose advantage is positive.
    """
    # The value is a product with the log-prob, so what stands behind the mask must be gone before it.
    logprobs = zero_masked(logprobs, mask)
    log_ratio = logprobs.detach() - zero_masked(old_logprobs, mask)
    advantages = zero_masked(advantages, mask)
    ratio = bounded_ratio(log_ratio)
    loss = -ratio.clamp(max=1 + clip_high) * advantages * logprobs
    clipped = (ratio > 1 + clip_high) & (advantages > 0)
    return TokenLoss(loss, policy_statistics(loss, clipped, ratio, log_ratio, advantages, mask))


__all__ = [
    "POLICY_LOSSES",
    "DEFAULT_LOSS_AGGREGATION",
    "TokenLoss",
    "LossAggregation",
    "PolicyLoss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "aggregated",
]

LossAggregation = Literal["token", "sequence", "constant"]
"""What the sum over an optimizer step is divided by: its tokens; each response by its length, then by the number of responses;
or the number of responses times one length for all."""


class PolicyLoss(Protocol):
    """The call that every policy loss answers; tensors are [B, T], see `clipped_policy_loss`."""

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None,
    ) -> TokenLoss:
        """Per-token loss and statistics."""
        ...


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo": clipped_policy_loss,
    "gspo": sequence_policy_loss,
    "cispo": bounded_weight_loss,
}

DEFAULT_LOSS_AGGREGATION: dict[str, LossAggregation] = {"ppo": "token", "gspo": "sequence", "cispo": "token"}
"""The loss_aggregation that each loss was published with (for ppo, that of DAPO and of both lines of TRL)."""


def aggregated(loss: Tensor, mask: Tensor, loss_aggregation: LossAggregation, longest: int) -> Tensor:
    """Divide what must be divided row by row; the caller divides by the tokens or responses of the whole optimizer step.

    Args:
        loss: float [B, T], 0 behind the mask.
        mask: bool [B, T], the action mask.
        loss_aggregation: `token` leaves the loss as it is; `sequence` divides by the row's length, so that each response counts
            the same (Shao et al. 2024); `constant` divides by `longest`, so that each token does, whatever the others' lengths
            (Liu et al. 2025).
        longest: the constant, in tokens.
    """
    if loss_aggregation == "token":
        return loss
    return loss / (mask.sum(1, keepdim=True).clamp(min=1) if loss_aggregation == "sequence" else longest)
