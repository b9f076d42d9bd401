"""Advantage estimators by name, and the call that runs one.

Group estimators compare the responses to one prompt and need no critic. A response whose reward is NaN failed: it is left out
of its group, its own advantage is 0, and a group with fewer than two others has no signal (as in TRL 1.16.0).

GRPO: standard deviations above the group's mean (Shao et al. 2024, section 4.1.2).

Dr. GRPO: the group's mean is the baseline, without division by the standard deviation (Liu et al. 2025, "Understanding
R1-Zero-Like Training"). The division weights prompts that are nearly always or nearly never solved above the others. The
paper's other change, a constant divisor of the token sum, is `algorithm.policy_loss.loss_aggregation: constant`.

RLOO: reward minus the mean of the other responses to the prompt (Kool et al. 2019; Ahmadian et al. 2024, "Back to Basics").
Leaving the response itself out keeps the baseline independent of it, so the gradient is unbiased. It equals n / (n - 1) times
the distance to the mean of the whole group. Where a sample has several parts with rewards of their own, all are left out.

REINFORCE (Williams 1992): discounted rewards to go. REINFORCE++ (Hu et al. 2025) has the KL in the token rewards and whitens
advantages over the whole step, which replaces a baseline; its `-baseline` form first subtracts the group's mean score.

OPO: the baseline is the mean over the group weighted by length, which makes the variance of the gradient smallest where long
responses have long gradients (Hao et al. 2025, "On-Policy RL with Optimal Reward Baseline").

MaxRL: distance to the group's mean in units of the mean. Its gradient is that of maximum likelihood, up to the order of the
group's size (Tajwar et al. 2026, "Maximum Likelihood Reinforcement Learning"). It expects rewards of at least 0.

GDPO: each reward is compared within the group by itself, so that two rewards whose sums are equal do not cancel (Liu et al.
2026, "Group reward-Decoupled Normalization Policy Optimization").

ReMax: the score of the greedy response to the prompt is the baseline (Li et al. 2024, algorithm 1). One sample per prompt is
enough, plus one greedy response. Where greedy responses score far from samples, as with an untrained model, all advantages have
one sign and hide the signal; `whiten: true` removes this offset.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rayrlhf.algorithms.estimator import AdvantageEstimator, AdvantageInputs, AdvantageMethod, Advantages
from rayrlhf.algorithms.gae import gae, gae_estimator
from rayrlhf.algorithms.masking import whiten, zero_masked
from rayrlhf.plugins import Registry


class GroupMoments(NamedTuple):
    """Moments of each response's group, all float64 [B].

    Attributes:
        size: number of known rewards, or sum of their votes.
        mean: their mean; NaN where none is known.
        std: their unbiased standard deviation; NaN where fewer than two are known.
    """

    size: Tensor
    mean: Tensor
    std: Tensor


def group_moments(rewards: Tensor, groups: Tensor, votes: Tensor | None = None) -> GroupMoments:
    """Return moments over the responses with the same group number.

    Args:
        rewards: float [B], NaN for a response that failed.
        groups: int64 [B], in any order.
        votes: float [B], weight of each response; None for 1 each.
    """
    known = _known_votes(rewards, votes)
    values = torch.where(known > 0, rewards.double(), 0.0)
    size = _whole(_totals(known, groups))
    mean = _totals(known * values, groups) / torch.where(size > 0, size, torch.nan)
    squares = _totals(known * torch.where(known > 0, (values - mean).square(), 0.0), groups)
    return GroupMoments(size, mean, (squares / torch.where(size > 1, size - 1, torch.nan)).sqrt())


def others_moments(inputs: AdvantageInputs) -> GroupMoments:
    """Return moments of `sequence_rewards` over the other samples of each response's group.

    A response's own sample is left out with all of its parts.
    """
    rewards = inputs.sequence_rewards.double()
    size, mean, std = group_moments(rewards, inputs.groups, inputs.votes)
    samples = torch.arange(len(rewards), device=rewards.device) if inputs.samples is None else inputs.samples
    known = _known_votes(rewards, inputs.votes)
    gap = torch.where(known > 0, rewards - mean, 0.0)
    own = _totals(known * gap, samples)
    left = _whole(size - _totals(known, samples))
    left = torch.where(left > 0, left, torch.nan)
    squares = std.square() * (size - 1) - _totals(known * gap.square(), samples) - own.square() / left
    return GroupMoments(left, mean - own / left, (squares.clamp(min=0) / torch.where(left > 1, left - 1, torch.nan)).sqrt())


def _known_votes(rewards: Tensor, votes: Tensor | None) -> Tensor:
    return (~rewards.isnan()).double() if votes is None else torch.where(rewards.isnan(), 0.0, votes.double())


def _totals(values: Tensor, numbers: Tensor) -> Tensor:
    """Return for each entry the sum over the entries with the same number, float64 [B]."""
    _, index = torch.unique(numbers, return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1, dtype=torch.float64, device=values.device)
    return sums.index_add(0, index, values.double())[index]


def _whole(votes: Tensor) -> Tensor:
    """Return sums of votes without the rounding of their parts: thirds add up to 1."""
    return votes.mul(2**20).round() / 2**20


def known_or_zero(advantages: Tensor) -> Tensor:
    """Replace NaN by 0: failed responses, and groups too small to compare."""
    return advantages.nan_to_num(nan=0.0)


def has_contrast(rewards: Tensor, groups: Tensor) -> Tensor:
    """Return True where two known rewards of the response's group differ, bool [B].

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
"""Added to the standard deviation (TRL 1.16.0). A group of equal rewards has advantage 0."""


def grpo_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Return (R - mean) / (std + 1e-4) over the group, std unbiased.

    All tokens of a response have the same advantage. R is `sequence_rewards`. The paper and TRL put the KL into the loss
    (`algorithm.kl.placement: loss`); with the KL in the reward it is part of R, and equal scores then get advantages from KL
    noise alone. `gamma` and `lam` have no effect.
    """
    rewards = inputs.sequence_rewards
    moments = group_moments(rewards, inputs.groups, inputs.votes)
    return Advantages(inputs.broadcast(known_or_zero((rewards - moments.mean) / (moments.std + EPSILON))), None)


def dr_grpo_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Return R - mean over the group, the same for all tokens.

    `gamma` and `lam` have no effect.
    """
    rewards = inputs.sequence_rewards
    advantages = rewards - group_moments(rewards, inputs.groups, inputs.votes).mean
    # A group with one known response is compared with itself, which gives 0, as required.
    return Advantages(inputs.broadcast(known_or_zero(advantages)), None)


def rloo_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Return R - mean of the group's other samples, the same for all tokens.

    `gamma` and `lam` have no effect. R is `sequence_rewards`, with the summed KL where it is in the reward, as in TRL 1.16.0's
    `RLOOTrainer`.
    """
    rewards = inputs.sequence_rewards
    return Advantages(inputs.broadcast(known_or_zero(rewards - others_moments(inputs).mean)), None)


def leave_one_out_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Return (R - mean) / (std + 1e-4), both of the group's other samples.

    All tokens of a response have the same advantage.
    Where the others are all equal the division is left out (as NeMo-RL's `use_leave_one_out_baseline`). `gamma` and `lam` have
    no effect.
    """
    rewards = inputs.sequence_rewards.double()
    _, mean, std = others_moments(inputs)
    # The difference of two sums is not exactly 0 where the others are equal.
    scale = torch.where(std <= 1e-6 * rewards.abs().nan_to_num().max().clamp(min=1e-30), 1.0, std + EPSILON)
    return Advantages(inputs.broadcast(known_or_zero((rewards - mean) / scale)), None)


def opo_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Return R minus the group's mean of R weighted by length.

    All tokens of a response have the same advantage. `gamma` and `lam` have no effect.
    """
    rewards = inputs.sequence_rewards
    mean = group_moments(rewards, inputs.groups, inputs.mask.sum(1)).mean
    return Advantages(inputs.broadcast(known_or_zero(rewards - mean)), None)


def maxrl_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Return (R - mean) / mean over the group.

    It is 0 where the mean is not positive, and the same for all tokens of a response. `gamma` and `lam` have no effect.
    """
    rewards = inputs.sequence_rewards
    mean = group_moments(rewards, inputs.groups, inputs.votes).mean
    return Advantages(inputs.broadcast(known_or_zero((rewards - mean) / torch.where(mean > 0, mean, torch.nan))), None)


def gdpo_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Return the weighted sum of each reward's GRPO advantage, normalized over the step.

    This is TRL 1.16.0's `multi_objective_aggregation="normalize_then_sum"`. A reward that does not apply to a response adds 0.
    `gamma` and `lam` have no effect.

    Raises:
        ValueError: there are no parts.
    """
    if inputs.parts is None or inputs.part_weights is None:
        raise ValueError("the advantage estimator 'gdpo' needs the values of each reward")
    total = torch.zeros(len(inputs.scores), dtype=torch.float64)
    for values, weight in zip(inputs.parts.unbind(1), inputs.part_weights, strict=True):
        moments = group_moments(values, inputs.groups, inputs.votes)
        total = total + weight * known_or_zero((values - moments.mean) / (moments.std + EPSILON))
    total = torch.where(inputs.scores.isnan(), torch.nan, total)
    everywhere = group_moments(total, torch.zeros_like(inputs.groups), inputs.votes)
    return Advantages(inputs.broadcast(known_or_zero((total - everywhere.mean) / (everywhere.std + EPSILON))), None)


def rewards_to_go(inputs: AdvantageInputs, *, gamma: float, skip_masked: bool) -> Tensor:
    """Return the sum of gamma^k r_{t+k} over the actions from t on, float [B, T].

    This is GAE at lambda 1 with values of 0.
    """
    zeros = torch.zeros_like(inputs.rewards)
    to_go, _ = gae(inputs.rewards, zeros, inputs.value_mask, gamma=gamma, lam=1.0, skip_masked=skip_masked)
    return to_go


def reinforce_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Return rewards to go, without a baseline; `lam` has no effect.

    A response whose reward is NaN has advantage 0.
    """
    to_go = rewards_to_go(inputs, gamma=gamma, skip_masked=skip_masked)
    return Advantages(zero_masked(known_or_zero(to_go), inputs.mask), None)


def group_baseline_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Return rewards to go minus the mean score of the group.

    Each token thus carries its own and later KL only. A response whose score is NaN has advantage 0 and is left out of the
    mean. `lam` has no effect.
    """
    to_go = rewards_to_go(inputs, gamma=gamma, skip_masked=skip_masked)
    size, mean, _ = group_moments(inputs.scores, inputs.groups, inputs.votes)
    baseline = torch.where(size > 1, mean, torch.nan).to(to_go.dtype)
    return Advantages(zero_masked(known_or_zero(to_go - baseline[:, None]), inputs.mask), None)


def remax_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Return rewards to go minus the greedy response's score; `lam` has no effect.

    A response has advantage 0 where its own reward or the baseline is NaN.

    Raises:
        ValueError: there are no baselines.
    """
    if inputs.baselines is None:
        raise ValueError("the advantage estimator 'remax' needs the scores of greedy responses")
    advantages = rewards_to_go(inputs, gamma=gamma, skip_masked=skip_masked) - inputs.baselines[:, None]
    return Advantages(zero_masked(known_or_zero(advantages), inputs.mask), None)


def zero_estimator(inputs: AdvantageInputs, *, gamma: float, lam: float, skip_masked: bool) -> Advantages:
    """Return 0 for every token, without reading a reward.

    A teacher's part, which is added to any advantages, is then the whole advantage; a loss of pairs reads none.
    """
    return Advantages(torch.zeros_like(inputs.rewards), None)


ADVANTAGE_ESTIMATORS: dict[str, AdvantageMethod] = {
    "gae": AdvantageMethod(gae_estimator, critic=True, whitened=True),
    "grpo": AdvantageMethod(grpo_estimator, smallest_group=2),
    "dr_grpo": AdvantageMethod(dr_grpo_estimator, smallest_group=2),
    "rloo": AdvantageMethod(rloo_estimator, smallest_group=2),
    "grpo_leave_one_out": AdvantageMethod(leave_one_out_estimator, smallest_group=3),
    "opo": AdvantageMethod(opo_estimator, smallest_group=2),
    "maxrl": AdvantageMethod(maxrl_estimator, smallest_group=2),
    "gdpo": AdvantageMethod(gdpo_estimator, smallest_group=2, parts=True),
    "reinforce": AdvantageMethod(reinforce_estimator),
    "reinforce++": AdvantageMethod(reinforce_estimator, whitened=True),
    "reinforce++-baseline": AdvantageMethod(group_baseline_estimator, whitened=True, smallest_group=2),
    "remax": AdvantageMethod(remax_estimator, greedy=True),
    "distillation": AdvantageMethod(zero_estimator, teacher=True),
    "pairs": AdvantageMethod(zero_estimator, smallest_group=2, pairs=True),
}


ADVANTAGE_REGISTRY: Registry[AdvantageMethod | AdvantageEstimator] = Registry(
    "advantage estimator",
    ADVANTAGE_ESTIMATORS,
    noun="estimator",
    accepts=lambda plugin: callable(plugin) or isinstance(plugin, AdvantageMethod),
)
"""Resolves `algorithm.advantage.estimator`."""

NO_ARGUMENTS: Mapping[str, Any] = {}


def advantage_method(name: str) -> AdvantageMethod:
    """Return an estimator with its requirements.

    A plugin that is a plain function needs neither critic nor group.

    Raises:
        UserError: no estimator has that name, or its module cannot be imported.
    """
    method = ADVANTAGE_REGISTRY.resolve(name)
    return method if isinstance(method, AdvantageMethod) else AdvantageMethod(method)


def estimate_advantages(
    estimator: str,
    inputs: AdvantageInputs,
    *,
    gamma: float,
    lam: float,
    skip_masked: bool,
    whitened: bool | None,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> Advantages:
    """Return the advantages of one whole step by the named estimator.

    Returns of the critic keep their own scale.

    Args:
        estimator: a key of `ADVANTAGE_ESTIMATORS`, `module:name` or `path/to/file.py:name`.
        inputs: the step's experience.
        gamma: discount per action.
        lam: GAE's lambda.
        skip_masked: see `gae.gae`.
        whitened: whiten the advantages over the action mask, without responses whose score is NaN; None takes the estimator's
            default.
        arguments: further keyword arguments of the estimator.

    Returns:
        `Advantages`, with advantages 0 outside the action mask.

    Raises:
        UserError: unknown estimator.
        ValueError: an input that the estimator needs is missing.
    """
    method = advantage_method(estimator)
    result = method.estimate(inputs, gamma=gamma, lam=lam, skip_masked=skip_masked, **arguments)
    if method.whitened if whitened is None else whitened:
        known = inputs.mask & ~inputs.scores.isnan()[:, None]
        return Advantages(whiten(result.advantages, known), result.returns)
    return Advantages(zero_masked(result.advantages, inputs.mask), result.returns)
