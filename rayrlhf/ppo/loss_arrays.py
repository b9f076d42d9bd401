"""Arrays of a step that only some settings of the policy loss read."""

import torch
from torch import Tensor

from rayrlhf.algorithms.covariance import clip_cov_tokens, covariances, kl_cov_tokens
from rayrlhf.algorithms.policy_losses import positive_weights, prompt_weights
from rayrlhf.config.policy_loss import ClipCovLossSection, KLCovLossSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.ppo.scoring import ScoredRollouts


def loss_arrays(
    config: PPOConfig, scored: ScoredRollouts, advantages: Tensor, logprobs: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """Return the weights and tokens of a step that its policy loss reads.

    Args:
        config: of the run.
        scored: the step's rollouts.
        advantages: float [B, T].
        logprobs: float [B, T], of the policy before the step.
        mask: bool [B, T], the tokens to train on.
    """
    loss, arrays = config.algorithm.policy_loss, dict[str, Tensor]()
    if loss.loss_aggregation == "prompt":
        arrays["prompt_weights"] = prompt_weights(torch.tensor([rollout.key.prompt for rollout in scored.rollouts]), mask)
    if loss.positive_coefficient:
        arrays["positive_weights"] = positive_weights(torch.from_numpy(scored.rewards.scores >= loss.right_from), mask)
    if isinstance(loss, ClipCovLossSection | KLCovLossSection) and mask.any():
        covariance = covariances(advantages, logprobs, mask)
        if isinstance(loss, KLCovLossSection):
            return arrays | {"selected_tokens": kl_cov_tokens(covariance, mask, share=loss.share)}
        step = scored.rollouts[0].key.step
        generator = torch.Generator().manual_seed(config.run.seed * 1_000_003 + step)
        bounds = {"share": loss.share, "cov_low": loss.cov_low, "cov_high": loss.cov_high}
        arrays["selected_tokens"] = clip_cov_tokens(covariance, mask, generator=generator, **bounds)
    return arrays
