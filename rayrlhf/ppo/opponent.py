"""Samples of the policy's opponent (XPO, Nash-MD): the odd ones of each training prompt."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Bool, Rollout, RolloutRequest


def with_opponent(config: PPOConfig, requests: list[RolloutRequest]) -> list[RolloutRequest]:
    """Return training requests, the odd ones to be sampled from the opponent if any."""
    share = config.opponent_share
    if not share:
        return requests
    return [replace(one, reference_share=share if one.key.sample % 2 else 0.0) for one in requests]


def own_rows(config: PPOConfig, rollouts: Sequence[Rollout]) -> Bool:
    """Mask the samples of the policy, not those of its opponent, bool [B]."""
    return np.array([not (config.opponent_share and rollout.key.sample % 2) for rollout in rollouts], np.bool_)
