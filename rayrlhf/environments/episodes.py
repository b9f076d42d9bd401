"""Multi-turn samples in a step: failed samples, placement of rewards, metrics. Pure functions.

A sample whose environment failed, retries included, is dropped as if it had never been sampled: a failure must never look like
a reward of 0. Its group continues with the other samples. If more than the configured share of the requested samples failed,
the run stops with the first reason.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.rollout import EnvironmentSection
from rayrlhf.data.records import SEGMENT_STRIDE, Rollout, SampleKey
from rayrlhf.errors import AlarmError

PART = "environment"
"""Name of the reward function that returns environment rewards."""


def without_failed(batches: Iterable[list[Rollout]], requested: int, section: EnvironmentSection) -> Iterator[list[Rollout]]:
    """Yield finished rollouts without the failed ones.

    Args:
        batches: rollouts in the order in which they finish.
        requested: number of requested rollouts.
        section: sets the share and the number of them that may fail.

    Raises:
        AlarmError: more failed.
    """
    failed: list[Rollout] = []
    allowed = min(max(section.max_failed_share * requested, section.failed_floor), requested - 1)
    for batch in batches:
        failed += [rollout for rollout in batch if rollout.failure]
        if len(failed) > allowed:
            first = failed[0]
            raise AlarmError(
                f"{len(failed)} of {requested} samples failed in their environment, above environment.max_failed_share "
                f"{section.max_failed_share:g}; prompt {first.key.prompt}, sample {first.key.sample}: {first.failure}"
            )
        played = [rollout for rollout in batch if not rollout.failure]
        if played:
            yield played


def with_extra_segments(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """Return rollouts with each one's extra segments after it, as samples of their own.

    A segment has its sample's reward.
    """
    return [part for rollout in rollouts for part in (rollout, *rollout.extra_segments)]


def sample_numbers(rollouts: Sequence[Rollout]) -> NDArray[np.int64]:
    """Return a number of each rollout's sample, int64 [B].

    Segments share the number of their sample.
    """
    numbers: dict[SampleKey, int] = {}
    samples = [rollout.key._replace(sample=rollout.key.sample % SEGMENT_STRIDE) for rollout in rollouts]
    return np.array([numbers.setdefault(sample, len(numbers)) for sample in samples])


def sample_votes(rollouts: Sequence[Rollout]) -> NDArray[np.float64]:
    """Return each rollout's vote in its group, float64 [B].

    Segments share the vote of their sample.
    """
    numbers = sample_numbers(rollouts)
    return 1 / np.bincount(numbers)[numbers]


def turn_weight(config: PPOConfig) -> float:
    """Return the weight of environment rewards that are paid per turn, else 0."""
    if config.environment is None or config.environment.credit == "episode":
        return 0.0
    return sum(function.weight for function in config.reward.functions if function.name == PART)


def turns(rollout: Rollout) -> int:
    """Return the number of turns: segments of sampled tokens."""
    mask = rollout.action_mask.astype(np.int8)
    return int((np.diff(mask, prepend=0) == 1).sum())


def episode_metrics(rollouts: Sequence[Rollout], requested: int) -> dict[str, float]:
    """Return a step's mean turns, environment tokens, segments per sample and failed share."""
    samples = sum(rollout.key.sample < SEGMENT_STRIDE for rollout in rollouts)
    return {
        "environment/turns": float(np.mean([turns(rollout) for rollout in rollouts])),
        "environment/tokens": float(np.mean([(~rollout.action_mask).sum() for rollout in rollouts])),
        "environment/segments": len(rollouts) / samples,
        "environment/stretches": len(rollouts) / samples,  # the former name
        "environment/failed": 1 - samples / requested,
    }
