"""`environment`: what a sample's environment paid it, summed over its turns."""

from collections.abc import Sequence

from rayrlhf.data.records import Rollout
from rayrlhf.errors import UserError


def environment(rollouts: Sequence[Rollout]) -> list[float]:
    """Return each sample's sum of rewards.

    Raises:
        UserError: the run has no environment.
    """
    sums = []
    for rollout in rollouts:
        if rollout.rewards is None:
            raise UserError("reward function 'environment' pays what an environment said: give an `environment:` section")
        sums.append(float(rollout.rewards.sum()))
    return sums
