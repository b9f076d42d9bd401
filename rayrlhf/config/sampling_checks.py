"""Checks of `rollout.refill_rounds` and `rollout.overissue` across sections."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rayrlhf.algorithms.estimator import AdvantageMethod
    from rayrlhf.config.ppo import PPOConfig


def check_refill(config: "PPOConfig", method: "AdvantageMethod") -> None:
    """Check that groups without contrast may be replaced.

    Raises:
        ValueError: they have none ever, or something learns from them.
    """
    rollout = config.rollout
    if rollout.refill_rounds and rollout.samples_per_prompt == 1:
        raise ValueError(
            f"rollout.refill_rounds {rollout.refill_rounds} replaces prompts whose responses all score the same, as "
            "a single one always does: set rollout.samples_per_prompt to 2 or more"
        )
    if rollout.refill_rounds and (config.teacher is not None or method.parts):
        reader = "a teacher" if config.teacher is not None else f"the estimator {config.algorithm.advantage.estimator!r}"
        raise ValueError(
            f"rollout.refill_rounds {rollout.refill_rounds} replaces prompts whose responses all score the same, but "
            f"{reader} learns from those too; expected 0"
        )


def check_overissue(config: "PPOConfig") -> None:
    """Check that nothing needs the groups which `rollout.overissue` cancels.

    Raises:
        ValueError: a setting does.
    """
    rollout, staleness = config.rollout, config.asynchronous.max_staleness
    if not rollout.overissue:
        return
    divergence = config.teacher.divergence if config.teacher is not None else None
    excluded = {
        "run.determinism 'exact': which groups finish first depends on time; expected 'fast'": (
            config.run.determinism == "exact"
        ),
        f"async.max_staleness {staleness}: steps are sampled ahead, so none waits for its longest responses; expected 0": (
            staleness > 0
        ),
        f"rollout.refill_rounds {rollout.refill_rounds}: a round would wait for its longest responses; expected 0": (
            rollout.refill_rounds > 0
        ),
        "teacher.divergence.student_share below 1: steps of given responses sample nothing; expected 1": (
            divergence is not None and divergence.student_share < 1
        ),
    }
    for reason, holds in excluded.items():
        if holds:
            raise ValueError(f"rollout.overissue {rollout.overissue:g} with {reason}")
