"""REINFORCE (Williams 1992) on discounted rewards to go, and the two forms of REINFORCE++ (Hu et al. 2025).

REINFORCE++ is REINFORCE with the KL in the token rewards and advantages whitened over the whole step, which then stands for a
baseline; its `-baseline` form takes the mean score of the prompt's responses off first. Whitening is the caller's part.
"""

import torch
from torch import Tensor

from rayrlhf.algorithms.estimator import AdvantageInputs, Advantages
from rayrlhf.algorithms.gae import gae
from rayrlhf.algorithms.groups import group_moments, known_or_zero
from rayrlhf.algorithms.masking import zero_masked


def rewards_to_go(inputs: AdvantageInputs, *, gamma: float, skip_masked: bool) -> Tensor:
    """Sum of gamma^k r_{t+k} over the actions from t on, float [B, T]: what GAE gives at lambda 1 with a critic that says 0."""
    nothing = torch.zeros_like(inputs.rewards)
    to_go, _ = gae(inputs.rewards, nothing, inputs.value_mask, gamma=gamma, lam=1.0, skip_masked=skip_masked)
    return to_go


def reinforce_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Rewards to go, without a baseline; `lam` has no use here. A response whose reward is NaN has advantage 0."""
    to_go = rewards_to_go(inputs, gamma=gamma, skip_masked=skip_masked)
    return Advantages(zero_masked(known_or_zero(to_go), inputs.mask), None)


def group_baseline_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Rewards to go minus the mean score of the group, so that each token pays for its own and later KL only.

    A response whose score is NaN has advantage 0 and is left out of the mean; `lam` has no use here.
    """
    to_go = rewards_to_go(inputs, gamma=gamma, skip_masked=skip_masked)
    size, mean, _ = group_moments(inputs.scores, inputs.groups)
    baseline = torch.where(size > 1, mean, torch.nan).to(to_go.dtype)
    return Advantages(zero_masked(known_or_zero(to_go - baseline[:, None]), inputs.mask), None)
