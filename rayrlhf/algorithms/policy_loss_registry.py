"""Policy losses by name, and the call that evaluates one.

A loss from outside is a function with the signature `PolicyLoss`, named by `module:function` or `path/to/file.py:function`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from rayrlhf.algorithms.losses import TokenLoss
from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.algorithms.policy_losses import (
    LossInputs,
    PolicyLoss,
    bounded_ratio,
    cispo_loss,
    gspo_loss,
    policy_statistics,
    ppo_loss,
)
from rayrlhf.algorithms.trust_region_losses import (
    clip_cov_loss,
    dppo_loss,
    gmpo_loss,
    kl_cov_loss,
    sapo_loss,
    topr_loss,
)
from rayrlhf.plugins import Registry

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo": ppo_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
    "sapo": sapo_loss,
    "gmpo": gmpo_loss,
    "dppo": dppo_loss,
    "topr": topr_loss,
    "clip_cov": clip_cov_loss,
    "kl_cov": kl_cov_loss,
}
"""Built-in policy losses. Each has a section of its own in `rayrlhf.config.policy_loss`."""

POLICY_LOSS_REGISTRY: Registry[PolicyLoss] = Registry("policy loss", POLICY_LOSSES)
"""Resolves `algorithm.policy_loss.name`."""


def token_policy_loss(name: str, inputs: LossInputs, arguments: Mapping[str, Any]) -> TokenLoss:
    """Evaluate a policy loss by name; a plugin's result is checked and completed.

    Statistics that a plugin does not return come from the token ratios, so the ratio guard and early stopping work with it.

    Args:
        name: a key of `POLICY_LOSSES`, `module:function` or `path/to/file.py:function`.
        inputs: tensors of one micro-batch.
        arguments: keyword arguments of the loss.

    Raises:
        UserError: no loss has that name, or its module cannot be imported.
        TypeError: a plugin returned something else than a `TokenLoss` with a loss of shape [B, T].
    """
    token_loss = POLICY_LOSS_REGISTRY.resolve(name)(inputs, **arguments)
    if name in POLICY_LOSSES:
        return token_loss
    shape = tuple(inputs.mask.shape)
    if not isinstance(token_loss, TokenLoss) or tuple(token_loss.loss.shape) != shape:
        found = f"loss {tuple(token_loss.loss.shape)}" if isinstance(token_loss, TokenLoss) else type(token_loss).__name__
        raise TypeError(f"policy loss {name!r} returned {found}, expected a TokenLoss with a loss of shape {shape}")
    loss = zero_masked(token_loss.loss, inputs.mask)
    log_ratio = zero_masked(inputs.logprobs - inputs.old_logprobs, inputs.mask)
    unclipped = torch.zeros_like(inputs.mask)
    usual = policy_statistics(loss, unclipped, bounded_ratio(log_ratio), log_ratio, inputs.advantages, inputs.mask)
    return TokenLoss(loss, usual | token_loss.statistics)
