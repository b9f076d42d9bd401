"""GSPO: the clipped surrogate on the ratio of whole responses (Zheng et al. 2025, "Group sequence policy optimization").

The score belongs to the response, so its ratio does too: s = (p(y) / p_old(y))^(1/|y|), the geometric mean of the token ratios.
Either all tokens of a response are clipped or none. Ratios of responses stay much closer to 1 than those of tokens, so the clip
range is narrower: the paper takes 3e-4 below and 4e-4 above.
"""

from torch import Tensor

from rayrlhf.algorithms.loss_terms import LossTerms
from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.algorithms.policy_loss import bounded_ratio, clipped_surrogate, policy_statistics


def sequence_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual_clip: float | None = None,
) -> LossTerms:
    """max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)) at each token, s being its response's ratio.

    Divided by the response's length and averaged over responses (normalisation `sequence`, the default here) this is equation 5
    of the paper, and TRL 1.16.0's `importance_sampling_level="sequence"` with `loss_type="grpo"`.

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
    return LossTerms(loss, policy_statistics(loss, clipped, ratio, log_ratio, advantages, mask))
