"""Objectives of the learning roles, and the samples of each optimizer step."""

from collections.abc import Sequence

import numpy as np

from rayrlhf.actors.placement import TrainRole
from rayrlhf.algorithms.advantages import advantage_method
from rayrlhf.algorithms.kl import KL_REGISTRY
from rayrlhf.algorithms.policy_loss_registry import POLICY_LOSS_REGISTRY
from rayrlhf.config.algorithm import AlgorithmSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.engines.objectives.base import Objective
from rayrlhf.engines.objectives.policy import PolicyObjective, SharedObjective, ValueObjective
from rayrlhf.engines.objectives.preference import DirectPreferenceObjective, NashObjective
from rayrlhf.engines.objectives.supervised import DistillationObjective
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.plugins import bind_arguments


def check_algorithm(section: AlgorithmSection) -> None:
    """Check the names and arguments of policy loss, KL and advantage estimator.

    Raises:
        UserError: no function has that name, its module cannot be imported, or an argument is unknown or missing.
    """
    loss, kl, advantage = section.policy_loss, section.kl, section.advantage
    options = {"gamma": advantage.gamma, "lam": advantage.lam, "skip_masked": advantage.skip_masked}
    estimate = advantage_method(advantage.estimator).estimate
    bind_arguments(f"policy loss {loss.name!r}", POLICY_LOSS_REGISTRY.resolve(loss.name), loss.loss_arguments, 1)
    bind_arguments(f"advantage estimator {advantage.estimator!r}", estimate, options | advantage.arguments, 1)
    if ":" in kl.estimator:
        bind_arguments(f"KL estimator {kl.estimator!r}", KL_REGISTRY.resolve(kl.estimator), kl.arguments, 1)


def make_objectives(config: PPOConfig) -> dict[TrainRole, Objective]:
    """Return one objective per learning role; a shared critic has none of its own."""
    algorithm = config.algorithm
    temperature = config.rollout.temperature
    if (pairs := algorithm.online_dpo) is not None:
        if pairs.variant == "nash_md":
            return {"policy": NashObjective(pairs.beta, temperature)}
        exploration = pairs.alpha if pairs.variant == "xpo" else 0.0
        direct = DirectPreferenceObjective(
            pairs.loss, pairs.beta, pairs.label_smoothing, exploration=exploration, temperature=temperature
        )
        return {"policy": direct}
    corrected = algorithm.off_policy_correction.enabled
    policy = PolicyObjective(
        algorithm.policy_loss,
        algorithm.kl,
        temperature,
        importance=corrected,
        longest=config.rollout.max_new_tokens,
        gap=config.old_logprobs != "recomputed",
        distillation=_distillation(config),
        routing=config.rollout.replays_routing,
    )
    value = ValueObjective(algorithm.value_loss, temperature)
    if config.critic.kind == "shared":
        return {"policy": SharedObjective(policy, value)}
    if config.critic.kind == "separate":
        return {"policy": policy, "critic": value}
    return {"policy": policy}


def _distillation(config: PPOConfig) -> DistillationObjective | None:
    teacher = config.teacher
    if teacher is None or teacher.divergence is None:
        return None
    return DistillationObjective(beta=teacher.divergence.beta, coefficient=teacher.coefficient)


def learning_roles(objectives: dict[TrainRole, Objective], config: PPOConfig, step: int) -> dict[TrainRole, Objective]:
    """Return the objectives of a step, counted from 0.

    During its warm-up or pretraining the critic learns alone.
    """
    if step < config.critic.steps_alone:
        return {role: objective for role, objective in objectives.items() if role == "critic"}
    return objectives


def plan_update(groups: Sequence[Sequence[int]], epochs: int, mini_batch_size: int, run_seed: int, step: int) -> UpdatePlan:
    """Shuffle groups of rows for each epoch and cut them into optimizer steps.

    Rows of a group stay together, so that the prompt that they share is computed once. The order depends on (groups, run seed,
    step) only. Without rows there is no optimizer step.
    """
    random = np.random.default_rng((run_seed, step))
    plan = []
    for _ in range(epochs):
        order = [row for group in random.permutation(len(groups)) for row in groups[group]]
        plan.append([order[start : start + mini_batch_size] for start in range(0, len(order), mini_batch_size)])
    return UpdatePlan(plan)
