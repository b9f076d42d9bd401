"""CISPO: bound the importance weight and keep every token's gradient (MiniMax 2025, "MiniMax-M1", section 3.1).

PPO's clip silences tokens whose ratio left the range, and rare tokens on which a chain of thought turns leave it first. Here
the ratio is a weight without gradient on the log-prob, as in REINFORCE, and the bound only keeps the weight from running away.
"""

from torch import Tensor

from rayrlhf.algorithms.loss_terms import LossTerms
from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.algorithms.policy_loss import bounded_ratio, policy_statistics


def bounded_weight_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 4.0,
    dual_clip: float | None = None,
) -> LossTerms:
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
    return LossTerms(loss, policy_statistics(loss, clipped, ratio, log_ratio, advantages, mask))
