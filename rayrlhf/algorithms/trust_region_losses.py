"""Policy losses per token that bound an update by other means than PPO's clip.

SAPO replaces the clip by a gate that closes smoothly (Gao et al. 2025, "Soft Adaptive Policy Optimization").

GMPO takes the geometric mean of clipped token ratios, so that one outlier moves the ratio of a response less than in the
arithmetic mean of GRPO (Zhao et al. 2025, "Geometric-Mean Policy Optimization").

DPPO masks tokens by the divergence between the two policies instead of by their ratio, which is large for rare tokens that
hardly moved (Qi et al. 2026, "Rethinking the Trust Region in LLM Reinforcement Learning"). The divergence is between two-event
distributions ("this token" or "another one"), which needs only the log-probs of sampled tokens.

TOPR raises the log-prob of good responses as SFT does, and weights bad ones by their probability ratio, at most 1 (Le Roux et
al. 2025, "Tapered Off-Policy REINFORCE"). A bad response that the policy no longer samples thus loses its influence.

Clip-Cov and KL-Cov restrain the few tokens whose advantage and log-prob covary most, because they lower the entropy (Cui et
al. 2025, "The Entropy Mechanism of Reinforcement Learning"). `covariance` selects them.
"""

from typing import Literal

import torch
from torch import Tensor

from rayrlhf.algorithms.losses import TokenLoss
from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.algorithms.policy_losses import LossInputs, bounded_ratio, clipped_surrogate, policy_statistics


def sapo_loss(inputs: LossInputs, *, temperature_positive: float = 1.0, temperature_negative: float = 1.05) -> TokenLoss:
    """Return -A (4 / tau) sigmoid(tau (rho - 1)), tau by the sign of A.

    At rho = 1 the gradient is that of PPO. As TRL 1.16.0's `loss_type="sapo"` with the loss aggregation `sequence`.

    Args:
        inputs: log-probs, advantages and mask; the optional tensors are not read.
        temperature_positive: tau of tokens with A > 0; a larger one closes the gate sooner.
        temperature_negative: tau of the other tokens.

    Returns:
        The token loss with the statistics of `ppo_loss`; nothing counts as clipped.
    """
    log_ratio, advantages = _masked(inputs)
    ratio = bounded_ratio(log_ratio)
    tau = torch.full_like(ratio, temperature_negative).masked_fill(advantages > 0, temperature_positive)
    loss = -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    return _token_loss(loss, torch.zeros_like(inputs.mask), ratio, log_ratio, advantages, inputs.mask)


def gmpo_loss(inputs: LossInputs, *, clip_low: float = 0.4, clip_high: float = 0.4) -> TokenLoss:
    """Return -A s, s the geometric mean of the response's clipped token ratios.

    A log-ratio is clipped to at most `clip_high` where A > 0, and to at least -`clip_low` elsewhere. With the loss aggregation
    `sequence` this is equation 4 of the paper.

    Args:
        inputs: log-probs, advantages and mask; the optional tensors are not read.
        clip_low: how far a log-ratio may fall below 0.
        clip_high: how far a log-ratio may rise above 0.

    Returns:
        The token loss with the statistics of `ppo_loss`; `val/ratio` is s.
    """
    log_ratio, advantages = _masked(inputs)
    bounded = torch.where(advantages > 0, log_ratio.clamp(max=clip_high), log_ratio.clamp(min=-clip_low))
    lengths = inputs.mask.sum(1, keepdim=True).clamp(min=1)
    ratio = bounded_ratio(bounded.sum(1, keepdim=True) / lengths).expand(log_ratio.shape)
    return _token_loss(-advantages * ratio, bounded != log_ratio, ratio, log_ratio, advantages, inputs.mask)


def dppo_loss(
    inputs: LossInputs,
    *,
    divergence: Literal["tv", "kl"] = "tv",
    threshold: float | None = None,
    ratio_high: float = 20.0,
) -> TokenLoss:
    """Return -A min(rho, ratio_high) log p, weight detached, 0 where the divergence exceeds the threshold.

    Only tokens that have moved in the direction of their advantage are masked. `tv` is |p - p_old|; `kl` is KL(p_old || p) of
    the Bernoulli distributions of the token.

    Args:
        inputs: log-probs, advantages and mask; the optional tensors are not read.
        divergence: see above.
        threshold: largest divergence; None takes that of the authors' script, 0.15 for `tv` and 0.05 for `kl`.
        ratio_high: upper bound of the weight (the authors' code).

    Returns:
        The token loss with the statistics of `ppo_loss`; masked tokens count as clipped.
    """
    log_ratio, advantages = _masked(inputs)
    logprobs, old = zero_masked(inputs.logprobs, inputs.mask), zero_masked(inputs.old_logprobs, inputs.mask)
    limit = threshold if threshold is not None else {"tv": 0.15, "kl": 0.05}[divergence]
    new_p, old_p = logprobs.detach().exp(), old.exp()
    if divergence == "tv":
        distance = (new_p - old_p).abs()
    else:
        tiny = 1e-8  # as the authors' code; a probability may round to 1
        distance = old_p * (old - logprobs.detach()) + (1 - old_p) * ((1 - old_p + tiny) / (1 - new_p + tiny)).log()
    outward = torch.where(advantages > 0, new_p > old_p, new_p < old_p)
    beyond = outward & (distance > limit) & inputs.mask
    ratio = bounded_ratio(log_ratio.detach())
    loss = torch.where(beyond, 0.0, -advantages * ratio.clamp(max=ratio_high) * logprobs)
    return _token_loss(loss, beyond, ratio, log_ratio, advantages, inputs.mask)


def topr_loss(inputs: LossInputs, *, weight_high: float = 1.0) -> TokenLoss:
    """Return -w A log p with a detached weight w.

    w is 1 where A > 0 and min(s, weight_high) elsewhere; s is the product of the response's token ratios. The sum over a
    response, as in the loss aggregation `constant`, is the paper's gradient of its log-probability.

    Args:
        inputs: log-probs, advantages and mask; the optional tensors are not read.
        weight_high: upper bound of w for tokens with A <= 0; the paper's canonical form has 1.

    Returns:
        The token loss with the statistics of `ppo_loss`; `val/ratio` is w, and bounded weights count as clipped.
    """
    log_ratio, advantages = _masked(inputs)
    logprobs = zero_masked(inputs.logprobs, inputs.mask)
    product = bounded_ratio(log_ratio.detach().sum(1, keepdim=True)).expand(log_ratio.shape)
    weight = torch.where(advantages > 0, 1.0, product.clamp(max=weight_high))
    bounded = (advantages < 0) & (product > weight_high)
    return _token_loss(-weight * advantages * logprobs, bounded, weight, log_ratio, advantages, inputs.mask)


def clip_cov_loss(
    inputs: LossInputs,
    *,
    share: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> TokenLoss:
    """Return the loss of PPO, without gradient at the selected tokens.

    Args:
        inputs: log-probs, advantages, mask and `selected` of `covariance.clip_cov_tokens`.
        share: read by the selection, as are `cov_low` and `cov_high`.
        cov_low: see `share`.
        cov_high: see `share`.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far the ratio may rise above 1.

    Returns:
        The token loss with the statistics of `ppo_loss`; selected tokens count as clipped.
    """
    log_ratio, advantages = _masked(inputs)
    ratio, selected = bounded_ratio(log_ratio), _selected(inputs)
    loss, clipped = clipped_surrogate(ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=None)
    return _token_loss(torch.where(selected, 0.0, loss), clipped | selected, ratio, log_ratio, advantages, inputs.mask)


def kl_cov_loss(inputs: LossInputs, *, share: float = 2e-3, penalty: float = 1.0) -> TokenLoss:
    """Return -A rho, plus `penalty` |log rho| at the selected tokens.

    Args:
        inputs: log-probs, advantages, mask and `selected` of `covariance.kl_cov_tokens`.
        share: read by the selection.
        penalty: weight of the KL from the policy before the step, the paper's beta.

    Returns:
        The token loss with the statistics of `ppo_loss`; penalized tokens count as clipped.
    """
    log_ratio, advantages = _masked(inputs)
    ratio, selected = bounded_ratio(log_ratio), _selected(inputs)
    loss = -advantages * ratio + penalty * zero_masked(log_ratio.abs(), selected)
    return _token_loss(loss, selected, ratio, log_ratio, advantages, inputs.mask)


def _masked(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Return log-ratios, with gradient, and advantages, both 0 where masked."""
    return zero_masked(inputs.logprobs - inputs.old_logprobs, inputs.mask), zero_masked(inputs.advantages, inputs.mask)


def _selected(inputs: LossInputs) -> Tensor:
    if inputs.selected is None:
        raise ValueError("the policy losses clip_cov and kl_cov read the tokens that `rayrlhf.algorithms.covariance` selects")
    return inputs.selected & inputs.mask


def _token_loss(loss: Tensor, clipped: Tensor, ratio: Tensor, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> TokenLoss:
    return TokenLoss(loss, policy_statistics(loss, clipped, ratio, log_ratio, advantages, mask))
