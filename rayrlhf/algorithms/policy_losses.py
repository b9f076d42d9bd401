"""Inputs and helpers of policy losses per token, and the losses PPO, GSPO and CISPO.

PPO is the clipped surrogate of Schulman et al. (2017, equation 7). Options are a wider upper bound of the ratio (clip-higher of
DAPO, Yu et al. 2025) and a bound on the loss of bad actions whose ratio exploded (dual clip, Ye et al. 2020).

GSPO is the clipped surrogate on one ratio per response (Zheng et al. 2025, "Group Sequence Policy Optimization"). The score
belongs to the response, so the ratio does too: s = (p(y) / p_old(y))^(1/|y|), the geometric mean of the token ratios. Either
all tokens of a response are clipped or none. This ratio stays much closer to 1 than that of a token, so its clip range is
narrower.

CISPO bounds the importance weight and keeps the gradient of every token (MiniMax 2025, "MiniMax-M1", section 3.1). PPO's clip
removes the gradient of tokens whose ratio left the range. The rare tokens that decide a chain of thought leave it first. In
CISPO the ratio is a detached weight on the log-prob, as in REINFORCE, and the bound only limits the weight.

A loss from outside is a function with the signature `PolicyLoss`, named by `module:function` or `path/to/file.py:function`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, Literal

import torch
from torch import Tensor

from rayrlhf.algorithms.losses import TokenLoss
from rayrlhf.algorithms.masking import zero_masked

MAX_LOG_RATIO = 20.0
"""Bound on |log-ratio|. A larger ratio carries no further information and could overflow to inf, which times 0 is NaN."""

LossAggregation = Literal["token", "sequence", "constant", "prompt"]
"""Divisor of an optimizer step's sum of token losses.

`token`: its tokens. `sequence`: each response's length, then the responses. `constant`: one length for all, then the responses.
`prompt`: the tokens of all responses to a prompt, then the prompts.
"""


@dataclass(frozen=True)
class LossInputs:
    """Inputs of a policy loss for one micro-batch: B responses, T response tokens, right-padded.

    The trainer passes 0 at positions where `mask` is False. All floats are float32.

    Attributes:
        logprobs: float [B, T], log-probs of the sampled tokens under the current policy, with gradient, in nats.
        old_logprobs: float [B, T], log-probs by the trainer before the step's first update.
        advantages: float [B, T].
        mask: bool [B, T], the action mask: True on tokens that the policy sampled.
        ref_logprobs: float [B, T], log-probs under the reference; None without one (`algorithm.kl.coefficient: 0`).
        rollout_logprobs: float [B, T], log-probs reported by the rollout engine; None where the caller has none.
        values: float [B, T], the critic's values before the step's first update; None without a critic.
        selected: bool [B, T], the tokens that a loss treats differently (`covariance`); None for losses that select none.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    values: Tensor | None = None
    selected: Tensor | None = None


PolicyLoss = Callable[Concatenate[LossInputs, ...], TokenLoss]
"""`loss(inputs, **arguments)`: loss and statistics per token, float [B, T], 0 where the mask is False.

The arguments are the keys of a built-in loss's section, or `algorithm.policy_loss.arguments` of a plugin.
"""


def ppo_loss(inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None) -> TokenLoss:
    """Return max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)).

    rho = p / p_old is the ratio of a token.

    Args:
        inputs: log-probs, advantages and mask; the optional tensors are not read.
        clip_low: how far the ratio may fall below 1.
        clip_high: how far the ratio may rise above 1.
        dual_clip: for A < 0 the loss is at most -A times this (> 1); None sets no bound.

    Returns:
        The token loss with the statistics `loss/policy_avg`, `policy/approxkl_avg` (half the squared log-ratio),
        `policy/clipfrac_avg` (1 where the clipped branch is the larger), `val/ratio`, `ppo/policy/policykl` (old - new
        log-prob) and `ppo/policy/advantages_mean`.
    """
    log_ratio = zero_masked(inputs.logprobs - inputs.old_logprobs, inputs.mask)
    advantages = zero_masked(inputs.advantages, inputs.mask)
    ratio = bounded_ratio(log_ratio)
    loss, clipped = clipped_surrogate(ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return TokenLoss(loss, policy_statistics(loss, clipped, ratio, log_ratio, advantages, inputs.mask))


def gspo_loss(
    inputs: LossInputs, *, clip_low: float = 3e-4, clip_high: float = 4e-4, dual_clip: float | None = None
) -> TokenLoss:
    """Return max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high)), s the response's ratio.

    With the loss aggregation `sequence`, its default, this is equation 5 of the paper, and TRL 1.16.0's
    `importance_sampling_level="sequence"` with `loss_type="grpo"`.

    Args:
        inputs: log-probs, advantages and mask; the optional tensors are not read.
        clip_low: how far the response's ratio may fall below 1.
        clip_high: how far the response's ratio may rise above 1.
        dual_clip: see `ppo_loss`.

    Returns:
        The token loss with the statistics of `ppo_loss`; `val/ratio` is s.
    """
    log_ratio = zero_masked(inputs.logprobs - inputs.old_logprobs, inputs.mask)
    advantages = zero_masked(inputs.advantages, inputs.mask)
    lengths = inputs.mask.sum(1, keepdim=True).clamp(min=1)
    ratio = bounded_ratio(log_ratio.sum(1, keepdim=True) / lengths).expand(log_ratio.shape)
    loss, clipped = clipped_surrogate(ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    return TokenLoss(loss, policy_statistics(loss, clipped, ratio, log_ratio, advantages, inputs.mask))


def cispo_loss(inputs: LossInputs, *, clip_high: float = 4.0) -> TokenLoss:
    """Return -min(rho, 1 + clip_high) A log p, the weight detached.

    Args:
        inputs: log-probs, advantages and mask; the optional tensors are not read.
        clip_high: upper bound of the weight minus 1, the paper's epsilon_high. The weight has no lower bound. TRL 1.16.0's
            `epsilon_high` is the bound itself: 5 there is 4 here.

    Returns:
        The token loss with the statistics of `ppo_loss`; `policy/clipfrac_avg` counts tokens whose weight was bounded and
        whose advantage is positive.
    """
    # The loss multiplies by the log-prob itself, so masked positions (possibly NaN) are zeroed first.
    logprobs = zero_masked(inputs.logprobs, inputs.mask)
    log_ratio = logprobs.detach() - zero_masked(inputs.old_logprobs, inputs.mask)
    advantages = zero_masked(inputs.advantages, inputs.mask)
    ratio = bounded_ratio(log_ratio)
    loss = -ratio.clamp(max=1 + clip_high) * advantages * logprobs
    clipped = (ratio > 1 + clip_high) & (advantages > 0)
    return TokenLoss(loss, policy_statistics(loss, clipped, ratio, log_ratio, advantages, inputs.mask))


def bounded_ratio(log_ratio: Tensor) -> Tensor:
    """Return e^log_ratio, any shape, with the log-ratio clamped to +-`MAX_LOG_RATIO`."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Return the negated clipped objective and the clipped positions (bool), both [B, T].

    Args:
        ratio: float [B, T], with gradient.
        advantages: float [B, T], 0 where masked.
        clip_low: see `ppo_loss`.
        clip_high: see `ppo_loss`.
        dual_clip: see `ppo_loss`.
    """
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(free, bounded)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss, bounded > free


def policy_statistics(
    loss: Tensor, clipped: Tensor, ratio: Tensor, log_ratio: Tensor, advantages: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """Return the statistics of every policy loss (see `ppo_loss`), detached, all [B, T].

    Args:
        loss: float [B, T].
        clipped: bool [B, T], True where the clip applied.
        ratio: float [B, T], the weight in the loss.
        log_ratio: float [B, T], of each token alone, 0 where masked.
        advantages: float [B, T], 0 where masked.
        mask: bool [B, T], the action mask.
    """
    statistics = {
        "loss/policy_avg": loss,
        "policy/approxkl_avg": 0.5 * log_ratio.square(),
        "policy/clipfrac_avg": clipped.to(loss.dtype),
        "val/ratio": zero_masked(ratio, mask),
        "ppo/policy/policykl": -log_ratio,
        "ppo/policy/advantages_mean": advantages,
    }
    return {name: values.detach() for name, values in statistics.items()}


def prompt_weights(groups: Tensor, mask: Tensor) -> Tensor:
    """Return each row's weight under the loss aggregation `prompt`, float [B, T].

    Of B responses to P prompts, a token of a prompt with N tokens has B / (P N): the mean over responses is then the mean over
    prompts of the token means (ScaleRL, Khatri et al. 2025).

    Args:
        groups: int64 [B]; responses to the same prompt share a number.
        mask: bool [B, T], the tokens to train on; responses without any count nowhere.
    """
    _, index = torch.unique(groups, return_inverse=True)
    lengths = mask.sum(1)
    tokens = torch.zeros(int(index.max()) + 1).index_add(0, index, lengths.float())
    weights: Tensor = (lengths > 0).sum() / ((tokens > 0).sum() * tokens[index]).clamp(min=1)
    return zero_masked(weights[:, None].expand(mask.shape), mask)


def positive_weights(right: Tensor, mask: Tensor) -> Tensor:
    """Return each token's weight in the language-model loss of correct responses, float [B, T].

    Of N tokens, N+ of them in correct responses, those have N / N+: the mean over all tokens is then the mean over theirs (Yue
    et al. 2025, "VAPO").

    Args:
        right: bool [B], the correct responses.
        mask: bool [B, T], the tokens to train on.
    """
    positive = mask & right[:, None]
    return positive * (mask.sum() / positive.sum().clamp(min=1))


def aggregated(
    loss: Tensor, mask: Tensor, loss_aggregation: LossAggregation, longest: int, weights: Tensor | None = None
) -> Tensor:
    """Divide each row by its part of the divisor.

    The caller divides by the step's tokens or responses.

    Args:
        loss: float [B, T], 0 where masked.
        mask: bool [B, T], the action mask.
        loss_aggregation: `token` leaves the loss as it is. `sequence` divides by the row's length, so that every response
            counts the same (Shao et al. 2024). `constant` divides by `longest`, so that every token counts the same at any
            response length (Liu et al. 2025). `prompt` multiplies by `weights`.
        longest: the constant, in tokens.
        weights: float [B, T] of `prompt_weights`, over the whole step.
    """
    if loss_aggregation == "token":
        return loss
    if loss_aggregation == "prompt":
        assert weights is not None
        return loss * weights
    return loss / (mask.sum(1, keepdim=True).clamp(min=1) if loss_aggregation == "sequence" else longest)
