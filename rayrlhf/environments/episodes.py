"""What samples with several turns add to a step: who is left out, where rewards are paid, and what is told of them. Pure.

A sample whose environment failed, also when it was played again, is left out as if it had never been sampled: a failure must
never look like a reward of 0. Its group goes on with the others. When more than the configured share of what a call asked for
failed, the run stops with the first reason.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import SEGMENT_STRIDE, Rollout
from rayrlhf.errors import AlarmError

PART = "environment"
"""Name of the reward function that pays what environments said."""


def without_failed(batches: Iterable[list[Rollout]], asked: int, most: float) -> Iterator[list[Rollout]]:
    """Pass finished rollouts on, failed ones left out.

    Args:
        batches: as they finish.
        asked: rollouts that were asked for.
        most: largest share of them that may fail.

    Raises:
        AlarmError: more failed.
    """
    failed: list[Rollout] = []
    for batch in batches:
        failed += [rollout for rollout in batch if rollout.failure]
        if len(failed) > most * asked:
            first = failed[0]
            raise AlarmError(
                f"{len(failed)} of {asked} samples failed in their environment, above environment.max_failed_share {most:g}; "
                f"prompt {first.key.prompt}, sample {first.key.sample}: {first.failure}"
            )
        played = [rollout for rollout in batch if not rollout.failure]
        if played:
            yield played


def with_extra_segments(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """Return rollouts with the further segments of each behind it: every segment is a sample to learn from.

    A segment has its sample's reward and counts as another response of its group, so a sample of several weighs more there.
    """
    return [part for rollout in rollouts for part in (rollout, *rollout.extra_segments)]


def turn_weight(config: PPOConfig) -> float:
    """Factor of what environments paid, where it is paid turn by turn; 0 where it is paid with the score, or not at all."""
    if config.environment is None or config.environment.credit == "episode":
        return 0.0
    return sum(function.weight for function in config.reward.functions if function.name == PART)


def turns(rollout: Rollout) -> int:
    """Turns of the policy: segments of sampled tokens."""
    mask = rollout.action_mask.astype(np.int8)
    return int((np.diff(mask, prepend=0) == 1).sum())


def episode_metrics(rollouts: Sequence[Rollout], asked: int) -> dict[str, float]:
    """Of a step's rollouts: mean turns and environment's tokens, segments a sample, and the share of samples that failed."""
    samples = sum(rollout.key.sample < SEGMENT_STRIDE for rollout in rollouts)
    return {
        "environment/turns": float(np.mean([turns(rollout) for rollout in rollouts])),
        "environment/tokens": float(np.mean([(~rollout.action_mask).sum() for rollout in rollouts])),
        "environment/stretches": len(rollouts) / samples,
        "environment/failed": 1 - samples / asked,
    }
