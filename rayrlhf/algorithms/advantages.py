"""The advantage estimators by name, and the one call that runs them.

Moments of the responses to one prompt, which group estimators compare with each other instead of asking a critic.

A response whose reward is NaN failed: nothing is known of it. It is left out of its group as if it had never been sampled, its
own advantage is 0, and a group of which fewer than two are left teaches nothing (TRL 1.16.0 does the same).

GRPO: by how many standard deviations a response beats the others to its prompt (Shao et al. 2024, section 4.1.2).

Dr. GRPO: the group's mean is the baseline, without division by its spread (Liu et al. 2025, "Understanding R1-Zero").

Dividing by the spread weighs prompts that are nearly always or nearly never solved above the others. The paper's other change,
that long responses are not paid less per token, is the loss's: `algorithm.policy_loss.loss_aggregation: constant`.

RLOO: a response against the mean of the others to its prompt (Kool et al. 2019; Ahmadian et al. 2024, "Back to basics").

Leaving the response itself out keeps the baseline independent of it, and so the gradient unbiased. It equals n / (n - 1) times
the distance to the whole group's mean.

REINFORCE (Williams 1992) on discounted rewards to go, and the two forms of REINFORCE++ (Hu et al. 2025).

REINFORCE++ is REINFORCE with the KL in the token rewards and advantages whitened over the whole step, which then stands for a
baseline; its `-baseline` form takes the mean score of the prompt's responses off first. Whitening is the caller's part.

ReMax: the score of the greedy response to a prompt is its baseline (Li et al. 2024, algorithm 1).

One sample a prompt is enough, and one greedy response beside it. Where greedy responses are far better or worse than samples,
as with a model that knows next to nothing, all advantages have one sign and drown the signal; `whiten: true` takes it out.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rayrlhf.algorithms.estimator import AdvantageInputs, AdvantageMethod, Advantages
from rayrlhf.algorithms.gae import gae, gae_estimator
from rayrlhf.algorithms.masking import whiten, zero_masked


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


EPSILON = 1e-4
"""Added to the standard deviation (TRL 1.16.0), so that a group of equal rewards has advantage 0."""


def grpo_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """(R - mean) / (std + 1e-4) over the group, std unbiased, the same for all tokens of a response.

    R is `sequence_rewards`. The paper and TRL put the KL into the loss (`algorithm.kl.placement: loss`); where it is in the
    reward it is part of R. `gamma` and `lam` have no use here.
    """
    rewards = inputs.sequence_rewards
    moments = group_moments(rewards, inputs.groups)
    return Advantages(inputs.broadcast(known_or_zero((rewards - moments.mean) / (moments.std + EPSILON))), None)


def dr_grpo_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """R - mean over the group, the same for all tokens of a response; `gamma` and `lam` have no use here."""
    rewards = inputs.sequence_rewards
    advantages = rewards - group_moments(rewards, inputs.groups).mean
    # A group of one known response would be compared with itself, which gives 0 as it should.
    return Advantages(inputs.broadcast(known_or_zero(advantages)), None)


def rloo_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """R - mean of the others, the same for all tokens of a response; `gamma` and `lam` have no use here.

    R is `sequence_rewards`, with the summed KL where it is in the reward, as in TRL 1.16.0's `RLOOTrainer`.
    """
    rewards = inputs.sequence_rewards
    size, mean, _ = group_moments(rewards, inputs.groups)
    others = torch.where(size > 1, size - 1, torch.nan)
    return Advantages(inputs.broadcast(known_or_zero((rewards - mean) * size / others)), None)


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


def remax_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Rewards to go minus the greedy response's score; `lam` has no use here.

    A response has advantage 0 where its own reward or the baseline is NaN.

    Raises:
        ValueError: there are no baselines.
    """
    if inputs.baselines is None:
        raise ValueError("the advantage estimator 'remax' needs the scores of greedy responses")
    advantages = rewards_to_go(inputs, gamma=gamma, skip_masked=skip_masked) - inputs.baselines[:, None]
    return Advantages(zero_masked(known_or_zero(advantages), inputs.mask), None)


ADVANTAGE_ESTIMATORS: dict[str, AdvantageMethod] = {
    "gae": AdvantageMethod(gae_estimator, critic=True, whitened=True),
    "grpo": AdvantageMethod(grpo_estimator, smallest_group=2),
    "dr_grpo": AdvantageMethod(dr_grpo_estimator, smallest_group=2),
    "rloo": AdvantageMethod(rloo_estimator, smallest_group=2),
    "reinforce": AdvantageMethod(reinforce_estimator),
    "reinforce++": AdvantageMethod(reinforce_estimator, whitened=True),
    "reinforce++-baseline": AdvantageMethod(group_baseline_estimator, whitened=True, smallest_group=2),
    "remax": AdvantageMethod(remax_estimator, greedy=True),
}


def estimate_advantages(
    estimator: str, inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool, whitened: bool | None
) -> Advantages:
    """Advantages of one whole step by the named estimator; the returns keep their own scale.

    Args:
        estimator: a key of `ADVANTAGE_ESTIMATORS`.
        inputs: the step's experience.
        gamma: discount per action.
        lam: GAE's lambda.
        skip_masked: see `gae.gae`.
        whitened: whiten the advantages over the action mask, responses whose score is NaN left out; None does what is usual
            for the estimator.

    Returns:
        `Advantages`, with advantages 0 outside the action mask.

    Raises:
        ValueError: unknown estimator, or one that lacks an input.
    """
    if estimator not in ADVANTAGE_ESTIMATORS:
        raise ValueError(f"advantage estimator {estimator!r} is not one of {', '.join(ADVANTAGE_ESTIMATORS)}")
    method = ADVANTAGE_ESTIMATORS[estimator]
    result = method.estimate(inputs, gamma=gamma, lam=lam, skip_masked=skip_masked)
    if method.whitened if whitened is None else whitened:
        known = inputs.mask & ~inputs.scores.isnan()[:, None]
        return Advantages(whiten(result.advantages, known), result.returns)
    return Advantages(zero_masked(result.advantages, inputs.mask), result.returns)
