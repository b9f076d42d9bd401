"""Tokens whose advantage and log-prob covary, as the losses Clip-Cov and KL-Cov select them.

Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning", section 4: the entropy falls with the covariance of the
log-prob and the advantage, which a small share of tokens makes up. The authors select in each micro-batch with the current
log-probs. Here the whole step is selected from once, with the log-probs before its first update, so that the selection does
not depend on how the batch is cut; in the first update both have the same log-probs.
"""

import torch
from torch import Tensor

from rayrlhf.algorithms.masking import masked_mean, zero_masked


def covariances(advantages: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return products of centered advantages and log-probs, float64 [B, T], 0 where masked.

    Args:
        advantages: float [B, T].
        logprobs: float [B, T], before the step's first update.
        mask: bool [B, T], the tokens to train on.

    Raises:
        ValueError: the mask is False everywhere.
    """
    first, second = advantages.double(), logprobs.double()
    return zero_masked((first - masked_mean(first, mask)) * (second - masked_mean(second, mask)), mask)


def clip_cov_tokens(
    covariance: Tensor, mask: Tensor, *, share: float, cov_low: float, cov_high: float, generator: torch.Generator
) -> Tensor:
    """Select at random among the tokens with a covariance between the bounds, bool [B, T].

    Args:
        covariance: float [B, T] of `covariances`.
        mask: bool [B, T].
        share: selected tokens, as a share of all; at least one.
        cov_low: lower bound, exclusive.
        cov_high: upper bound, exclusive.
        generator: draws the tokens.
    """
    candidates = (mask & (covariance > cov_low) & (covariance < cov_high)).flatten().nonzero().flatten()
    order = torch.randperm(len(candidates), generator=generator)
    return _chosen(candidates[order[: _count(mask, share)]], mask)


def kl_cov_tokens(covariance: Tensor, mask: Tensor, *, share: float) -> Tensor:
    """Select the tokens with the largest covariance, bool [B, T]; arguments as `clip_cov_tokens`."""
    order = covariance.masked_fill(~mask, -torch.inf).flatten().argsort(descending=True, stable=True)
    return _chosen(order[: _count(mask, share)], mask)


def _count(mask: Tensor, share: float) -> int:
    return min(max(1, int(share * int(mask.sum()))), int(mask.sum()))


def _chosen(indices: Tensor, mask: Tensor) -> Tensor:
    chosen = torch.zeros(mask.numel(), dtype=torch.bool)
    chosen[indices] = True
    return chosen.view(mask.shape)
