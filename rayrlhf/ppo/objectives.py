"""What each learning role minimises, from the config; and which samples each optimizer step sees."""

import numpy as np

from rayrlhf.actors.placement import Role
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.engines.objectives import Objective, PolicyObjective, SharedObjective, ValueObjective
from rayrlhf.engines.update_plan import UpdatePlan


def make_objectives(config: PPOConfig) -> dict[Role, Objective]:
    """One objective per learning role: policy and critic apart, or both on the policy's trunk."""
    algorithm = config.algorithm
    temperature = config.rollout.temperature
    policy = PolicyObjective(algorithm.policy_loss, algorithm.kl, temperature, longest=config.rollout.max_new_tokens)
    value = ValueObjective(algorithm.value_loss, temperature)
    if config.critic.kind == "shared":
        return {"policy": SharedObjective(policy, value)}
    if config.critic.kind == "separate":
        return {"policy": policy, "critic": value}
    return {"policy": policy}


def learning_roles(objectives: dict[Role, Objective], config: PPOConfig, step: int) -> dict[Role, Objective]:
    """The objectives of those that learn in a step, counted from 0: the critic alone during its warm-up."""
    if step < config.critic.warmup_steps:
        return {role: objective for role, objective in objectives.items() if role == "critic"}
    return objectives


def plan_update(samples: int, epochs: int, mini_batch_size: int, run_seed: int, step: int) -> UpdatePlan:
    """Shuffle the step's samples anew for each epoch and cut them into optimizer steps; depends on (run seed, step) only."""
    random = np.random.default_rng((run_seed, step))
    plan = []
    for _ in range(epochs):
        order = random.permutation(samples).tolist()
        plan.append([order[start : start + mini_batch_size] for start in range(0, samples, mini_batch_size)])
    return UpdatePlan(plan)
