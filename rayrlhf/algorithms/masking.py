"""Sums, moments and whitening over the True positions of a mask.

Multiplying by the mask would keep NaN (NaN * 0 is NaN), so masked values are replaced before any arithmetic. Whitening takes
the whole step, so that all ranks share one scale.
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
    """Replace values by 0 where `mask` (bool, same shape) is False.

    The gradient there is 0 as well.
    """
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the scalar sum of `values` where `mask` (bool, same shape) is True."""
    return zero_masked(values, mask).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the scalar mean of `values` where `mask` (bool, same shape) is True.

    Raises:
        ValueError: the mask is False everywhere.
    """
    return masked_sum(values, mask) / _count(mask)


def masked_moments(values: Tensor, mask: Tensor) -> MaskedMoments:
    """Return count, mean and unbiased variance of `values` where `mask` (bool) is True.

    Shapes are the same. The variance of one value is 0.

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
    """Return (x - mean) / sqrt(var + 1e-8) over `mask`, var unbiased.

    Args:
        values: float [B, T].
        mask: bool [B, T]; moments are over its True positions, the result is 0 elsewhere.
        shift_mean: False adds the mean back, so that rewards keep their level.

    Returns:
        Float [B, T]. A single value has variance 0 and so becomes 0 (or stays itself with `shift_mean=False`).

    Raises:
        ValueError: the mask is False everywhere.
    """
    _, mean, variance = masked_moments(values, mask)
    whitened = (values.double() - mean) * torch.rsqrt(variance + EPSILON)
    return zero_masked((whitened if shift_mean else whitened + mean).to(values.dtype), mask)
