"""Whitening: mean 0 and variance 1 over the tokens that count. Call it on the whole step, so that all ranks share one scale."""

import torch
from torch import Tensor

from rayrlhf.algorithms.masking import masked_moments, zero_masked

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
    whitened = (values - mean) * torch.rsqrt(variance + EPSILON)
    return zero_masked(whitened if shift_mean else whitened + mean, mask)
