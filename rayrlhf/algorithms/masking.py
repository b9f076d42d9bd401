"""Sums and moments over the True places of a mask.

A multiplication by the mask would let NaN through (NaN * 0 is NaN), so values behind the mask are replaced before any
arithmetic.

Whitening: mean 0 and variance 1 over the tokens that count. Call it on the whole step, so that all ranks share one scale.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class MaskedMoments(NamedTuple):
    """Scalar tensors: number of selected values, their mean and unbiased variance, both float64."""

    size: Tensor
    mean: Tensor
    variance: Tensor


def zero_masked(values: Tensor, mask: Tensor) -> Tensor:
    """Put 0 where `mask` (bool, same shape) is False. The gradient there is 0 as well."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Scalar sum of `values` where `mask` (bool, same shape) is True; 0 when it is nowhere."""
    return zero_masked(values, mask).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Scalar mean of `values` where `mask` (bool, same shape) is True.

    Raises:
        ValueError: the mask is False everywhere.
    """
    return masked_sum(values, mask) / _count(mask)


def masked_moments(values: Tensor, mask: Tensor) -> MaskedMoments:
    """Count, mean and unbiased variance of `values` where `mask` (bool, same shape) is True. The variance of one value is 0.

    Raises:
        ValueError: the mask is False everywhere.
    """
    count = _count(mask)
    # In float32 the mean of equal rewards is off by an ulp, which whitening scales by 1e4 and AdamW turns into a full step.
    values = values.double()
    mean = masked_sum(values, mask) / count
    squares = masked_sum((values - mean).square(), mask)
    return MaskedMoments(count, mean, squares / (count - 1).clamp(min=1))


def _count(mask: Tensor) -> Tensor:
    count = mask.sum()
    if not count:
        raise ValueError(f"the mask of shape {tuple(mask.shape)} selects no value")
    return count


EPSILON = 1e-8
"""Added to the variance (TRL 0.11.4 and 1.12.0)."""


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Whiten `values` [B, T] over `mask` [B, T] (bool): (x - mean) / sqrt(var + 1e-8), var unbiased.

    Args:
        values: float [B, T].
        mask: bool [B, T]; moments are taken where it is True, the result is 0 elsewhere.
        shift_mean: False adds the mean back, which rewards need to keep their level.

    Returns:
        Float [B, T]. A single value has variance 0 and so becomes 0 (or stays itself with `shift_mean=False`).

    Raises:
        ValueError: the mask is False everywhere.
    """
    _, mean, variance = masked_moments(values, mask)
    whitened = (values.double() - mean) * torch.rsqrt(variance + EPSILON)
    return zero_masked((whitened if shift_mean else whitened + mean).to(values.dtype), mask)
