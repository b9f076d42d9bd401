"""Check of `rollout.routing_replay` across sections."""

from typing import TYPE_CHECKING

from rayrlhf.config.rollout import BACKENDS

if TYPE_CHECKING:
    from rayrlhf.config.ppo import PPOConfig


def check_routing(config: "PPOConfig") -> None:
    """Check that nothing needs other experts than the replayed ones, or cannot bring them.

    Raises:
        ValueError: a setting does.
    """
    rollout, placement = config.rollout, config.placement.policy
    if not rollout.replays_routing:
        return
    excluded = {
        "algorithm.online_dpo: its pairs replay none; expected none": config.algorithm.online_dpo is not None,
        f"observe.record '{config.observe.record}': records hold no experts; expected 'off'": config.observe.record != "off",
        f"placement.policy.sequence_parallel {placement.sequence_parallel}: expected 1": placement.sequence_parallel > 1,
        f"placement.policy.tensor_parallel {placement.tensor_parallel}: expected 1": placement.tensor_parallel > 1,
    }
    from_engine = {
        "environment: turns bring no experts; expected none": config.environment is not None,
        "rollout.demonstrations.train_with 'without_demonstrations': the experts are those of another prompt; expected "
        "'with_demonstrations'": config.trains_without_demonstrations,
        f"rollout.backend '{rollout.backend}': expected {' or '.join(BACKENDS)}": rollout.backend not in BACKENDS,
        **{
            f"rollout.{key} {getattr(rollout, key)}: worker processes bring none; expected 1": getattr(rollout, key) > 1
            for key in ("tensor_parallel_size", "pipeline_parallel_size")
        },
    }
    source = config.algorithm.old_logprobs
    from_trainer = {
        f"algorithm.old_logprobs '{source}': no pass before the update chooses them; expected 'recomputed'":
        config.old_logprobs != "recomputed",
    }  # fmt: skip
    excluded |= from_engine if rollout.captures_routing else from_trainer
    for reason, holds in excluded.items():
        if holds:
            raise ValueError(f"rollout.routing_replay '{rollout.routing_replay}' with {reason}")
