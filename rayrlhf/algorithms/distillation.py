"""Advantages from a teacher that scores the policy's own samples.

On-policy distillation minimizes the reverse KL(policy || teacher) on responses of the policy (Gu et al. 2024, "MiniLLM";
Agarwal et al. 2024, "On-Policy Distillation of Language Models"; Lu and Thinking Machines Lab 2025). The log-ratio of teacher
to policy at a sampled token estimates it with its sign changed, so as an advantage it raises the tokens that the teacher finds
likelier than the policy does. Each token's own log-ratio alone (discount 0) trains the next token at the contexts that the
policy reaches; the sum over all later tokens (discount 1) is the gradient of the reverse KL of whole responses, with more
variance.
"""

import torch
from torch import Tensor

from rayrlhf.algorithms.gae import gae
from rayrlhf.algorithms.masking import zero_masked


def teacher_advantages(
    logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor, *, discount: float = 0.0, clip: float | None = None
) -> Tensor:
    """Return discounted sums of log-ratios, float [B, T], 0 where masked.

    Args:
        logprobs: float [B, T], of the policy that sampled.
        teacher_logprobs: float [B, T], of the same tokens under the teacher, at the same temperature.
        mask: bool [B, T], the action mask; other tokens are skipped.
        discount: per action; 0 returns the token's own log-ratio.
        clip: bound on the absolute log-ratio, in nats; None sets no bound.
    """
    ratio = zero_masked(teacher_logprobs - logprobs, mask)
    if clip is not None:
        ratio = ratio.clamp(-clip, clip)
    to_go, _ = gae(ratio, torch.zeros_like(ratio), mask, gamma=discount, lam=1.0, skip_masked=True)
    return zero_masked(to_go, mask)
