"""Moments of the responses to one prompt, which group estimators compare with each other instead of asking a critic.

A response whose reward is NaN failed: nothing is known of it. It is left out of its group as if it had never been sampled, its
own advantage is 0, and a group of which fewer than two are left teaches nothing (TRL 1.16.0 does the same).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class GroupMoments(NamedTuple):
    """Each response's view of its group, all [B], float64: how many are known, their mean, and their unbiased spread.

    The mean is NaN where none is known, the spread where fewer than two are.
    """

    size: Tensor
    mean: Tensor
    std: Tensor


def group_moments(rewards: Tensor, groups: Tensor) -> GroupMoments:
    """Moments over the responses with the same group number.

    Args:
        rewards: float [B], NaN for a response that failed.
        groups: int64 [B], in any order.
    """
    _, index = torch.unique(groups, return_inverse=True)
    known = ~rewards.isnan()
    values = torch.where(known, rewards.double(), 0.0)

    def total(parts: Tensor) -> Tensor:
        sums = torch.zeros(int(index.max()) + 1, dtype=torch.float64, device=rewards.device)
        return sums.index_add(0, index, parts.double())[index]

    size = total(known)
    mean = total(values) / torch.where(size > 0, size, torch.nan)
    squares = total(torch.where(known, (values - mean).square(), 0.0))
    return GroupMoments(size, mean, (squares / torch.where(size > 1, size - 1, torch.nan)).sqrt())


def known_or_zero(advantages: Tensor) -> Tensor:
    """Put 0 where there is nothing to learn: failed responses, and groups that are too small to compare."""
    return advantages.nan_to_num(nan=0.0)


def has_contrast(rewards: Tensor, groups: Tensor) -> Tensor:
    """Whether a response's group tells good from bad: bool [B], True where two known rewards of the group differ.

    Args:
        rewards: float [B], NaN for a response that failed.
        groups: int64 [B].
    """
    _, index = torch.unique(groups, return_inverse=True)
    contrast = torch.zeros(int(index.max()) + 1, dtype=torch.bool, device=rewards.device)
    for group in range(len(contrast)):
        known = rewards[index == group]
        known = known[~known.isnan()]
        contrast[group] = len(known) > 1 and bool(known.max() > known.min())
    return contrast[index]
