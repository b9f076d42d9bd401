"""Generalized advantage estimation (Schulman et al. 2016, equation 16).

delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lambda A_{t+1}, where t+1 is the policy's next action. Tokens of a
tool or an environment are no actions and are skipped by default. TRL up to 0.11 treats them as steps of value 0, which charges
the policy for a drop of the value that no action caused.

Decoupled GAE uses another lambda for the critic's returns: with 1 a reward at the end reaches the first tokens undiminished
(Yuan et al. 2025, VC-PPO, arXiv 2503.01491). Length-adaptive GAE gives each response lambda = 1 - 1 / (alpha length), so that
the weights of its errors sum to alpha times its length (Yue et al. 2025, VAPO, arXiv 2504.05118).
"""

from functools import partial

import torch
from torch import Tensor

from rayrlhf.algorithms.estimator import AdvantageInputs, Advantages
from rayrlhf.algorithms.masking import zero_masked


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float | Tensor, skip_masked: bool = True
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of a batch of responses.

    Args:
        rewards: float [B, T].
        values: float [B, T], the value before each token.
        mask: bool [B, T], the value mask.
        gamma: discount per action.
        lam: 0 is one-step TD, 1 is Monte Carlo; float [B] for one per response.
        skip_masked: bootstrap across masked tokens; False makes them steps of reward and value 0 (TRL 0.11.4). Both agree on
            masks without gaps.

    Returns:
        Advantages A and returns A + V, float [B, T], both 0 where the mask is False. After the last token the value is 0.
    """
    # Time first, so that each step of the loop reads and writes one contiguous row.
    rewards_by_time = zero_masked(rewards, mask).T.contiguous()
    values_by_time = zero_masked(values, mask).T.contiguous()
    mask_by_time = mask.T.contiguous()
    advantages_by_time = torch.empty_like(values_by_time)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        value = values_by_time[t]
        advantage = rewards_by_time[t] + gamma * next_value - value + gamma * lam * next_advantage
        advantages_by_time[t] = advantage
        if skip_masked:
            value = torch.where(mask_by_time[t], value, next_value)
            advantage = torch.where(mask_by_time[t], advantage, next_advantage)
        next_value, next_advantage = value, advantage
    advantages = zero_masked(advantages_by_time.T.contiguous(), mask)
    return advantages, advantages + zero_masked(values, mask)


def adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """Return 1 - 1 / (alpha length) for each response, float [B].

    It is 0 up to the length 1 / alpha, where the formula is negative.
    """
    return (1 - 1 / (alpha * lengths.clamp(min=1).double())).clamp(min=0).float()


def gae_estimator(
    inputs: AdvantageInputs,
    *,
    gamma: float,
    lam: float,
    skip_masked: bool,
    critic_lam: float | None = None,
    lam_alpha: float | None = None,
) -> Advantages:
    """Run `gae` as an `AdvantageEstimator`.

    Args:
        inputs: the step's experience.
        gamma: see `gae`.
        lam: lambda of the advantages.
        skip_masked: see `gae`.
        critic_lam: lambda of the returns; None takes that of the advantages.
        lam_alpha: alpha of `adaptive_lambda`, which replaces `lam`, of the response's actions.

    Raises:
        ValueError: there are no values.
    """
    if inputs.values is None:
        raise ValueError("the advantage estimator 'gae' needs a critic's values")
    estimate = partial(gae, inputs.rewards, inputs.values, inputs.value_mask, gamma=gamma, skip_masked=skip_masked)
    advantages, returns = estimate(lam=lam if lam_alpha is None else adaptive_lambda(inputs.mask.sum(1), lam_alpha))
    if critic_lam is not None:
        _, returns = estimate(lam=critic_lam)
    return Advantages(advantages, returns)
