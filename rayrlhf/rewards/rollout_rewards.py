"""Rewards computed from rollouts: the environment's own rewards and a soft length limit."""

from collections.abc import Sequence
from typing import Literal

from rayrlhf.data.records import Rollout
from rayrlhf.errors import UserError


def environment(rollouts: Sequence[Rollout]) -> list[float]:
    """Return the sum of each sample's environment rewards over its turns.

    Raises:
        UserError: the run has no environment.
    """
    sums = []
    for rollout in rollouts:
        if rollout.rewards is None:
            raise UserError("reward function 'environment' needs the rewards of an environment: give an `environment:` section")
        sums.append(float(rollout.rewards.sum()))
    return sums


def length_penalty(
    responses: list[str],
    soft_limit: int,
    hard_limit: int,
    unit: Literal["tokens", "characters"] = "tokens",
    rollouts: list[Rollout] | None = None,
) -> list[float]:
    """Return length penalties [B] from 0 (soft limit) to -1 (hard limit), linear between.

    The formula is the soft overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13); its cache is
    `hard_limit - soft_limit` here.

    Args:
        responses: [B].
        soft_limit: longest length without a penalty.
        hard_limit: length from which on the penalty is -1.
        unit: unit of the limits; tokens are response tokens, including a sampled stop token.
        rollouts: [B], needed to count tokens.

    Raises:
        UserError: the limits are not 0 <= soft < hard, the unit is unknown, or tokens cannot be counted.
    """
    if not 0 <= soft_limit < hard_limit:
        raise UserError(f"reward function 'length': expected 0 <= soft_limit < hard_limit, got {soft_limit} and {hard_limit}")
    if unit not in ("tokens", "characters"):
        raise UserError(f"reward function 'length': unit {unit!r}: expected 'tokens' or 'characters'")
    if unit == "characters":
        lengths = [len(response) for response in responses]
    elif rollouts is None:
        raise UserError("reward function 'length': unit 'tokens' needs rollouts; for plain text set unit to 'characters'")
    else:
        lengths = [len(rollout.response_ids) for rollout in rollouts]
    return [-min(1.0, max(0.0, (length - soft_limit) / (hard_limit - soft_limit))) for length in lengths]
