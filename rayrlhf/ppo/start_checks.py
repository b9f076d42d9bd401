"""Checks of a PPO run before Ray starts.

They cover run folder, CPUs, GPUs, memory, adapters, prompts and reward functions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from rayrlhf.actors.local_machine import check_local_machine
from rayrlhf.actors.placement import ClusterResources, make_plan
from rayrlhf.config.loading.load import dump_config
from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.rank_groups import weight_parts
from rayrlhf.data.records import Prompt
from rayrlhf.engines.rollout.factory import check_rollout_backend
from rayrlhf.engines.scoring.reward_model import stored_chance
from rayrlhf.models.load import checkpoint_dtype, load_tokenizer, resolve_dtype
from rayrlhf.models.skeleton import check_memory, exported_bytes, least_training_bytes, parameter_count
from rayrlhf.observe.cuda import check_vllm_device
from rayrlhf.observe.host_limits import FREE_BYTES, check_free_space
from rayrlhf.observe.memory import memory_limit_bytes
from rayrlhf.observe.metric_names import CHANCE_LEVEL
from rayrlhf.observe.run_folder import check_run_folder
from rayrlhf.observe.trackers import check_trackers
from rayrlhf.ppo.callbacks import Callback, resolve_callbacks
from rayrlhf.ppo.given_responses import check_given_responses
from rayrlhf.ppo.run_identity import stored_differences
from rayrlhf.ppo.run_models import check_models
from rayrlhf.ppo.run_prompts import load_prompts
from rayrlhf.ppo.update_objectives import check_algorithm
from rayrlhf.rewards.functions import load_functions
from rayrlhf.rewards.probe import probe_functions


class Checked(NamedTuple):
    """Results of the checks.

    Attributes:
        train: training prompts.
        held_out: prompts of evaluations.
        callbacks: constructors of `observe.callbacks`.
        notes: lines about what is valid but slow.
    """

    train: list[Prompt]
    held_out: list[Prompt]
    callbacks: list[Callable[[], Callback]]
    notes: list[str]


def check_start(config: PPOConfig) -> Checked:
    """Check all that can be checked without Ray and without weights.

    Raises:
        UserError: a plugin that is not installed, cannot be resolved or does not accept its arguments; a run folder that holds
            something else or cannot be written; too few CPUs or GPUs; models beyond the memory or the disk; a multimodal model;
            adapters for modules that a model lacks; a mistake in the prompts; a reward function that fails on made-up
            responses.
    """
    check_trackers(config.observe.trackers)
    check_rollout_backend(config.rollout)
    functions = load_functions(config.reward)
    check_algorithm(config.algorithm)
    callbacks = resolve_callbacks(config.observe.callbacks)
    check_run_folder(config.run.folder, dump_config(config), stored_differences, resume=config.run.resume)
    check_models(config)
    check_local_machine(config.placement.address, lambda machine: _check_fits(config, machine))
    needed = FREE_BYTES + exported_bytes(config.model)
    check_free_space(config.run.folder, needed, "the run and its model", "free some, or choose another run.root")
    train, held_out = load_prompts(config)
    check_given_responses(config, train)
    probed = functions if config.reward.probe and config.environment is None else []
    return Checked(
        train, held_out, callbacks, [*_by_chance(config), *probe_functions(probed, train, load_tokenizer(config.model))]
    )


def _by_chance(config: PPOConfig) -> list[str]:
    """Return a line about a reward model that is no better than chance."""
    chance = stored_chance(config.reward.model.models) if config.reward.model else None
    if chance is None or chance < CHANCE_LEVEL:
        return []
    return [
        f"reward.model: coins order its held-out pairs as well as it does with probability {chance:.2f} (by its statistics)"
    ]


def _check_fits(config: PPOConfig, machine: ClusterResources) -> None:
    """Check CPUs, GPUs and, on a machine without GPUs, the memory of the models."""
    if config.rollout.backend == "vllm":
        check_vllm_device("rollout.backend")
    make_plan(config, machine)
    if machine.gpus:
        return
    lora = config.model.model_copy(update={"lora": LoraSection()})
    shared = config.critic.model_copy(update={"kind": "shared", "model": None})
    changes: dict[str, dict[str, Any]] = {
        "critic.kind=shared": {"critic": shared} if config.critic.kind == "separate" else {},
        "model.lora={rank: 16}": {"model": lora},
        "model.lora={rank: 16} critic.kind=shared": {"model": lora, "critic": shared},
    }
    after = {change: sum(least_bytes(config.model_copy(update=update)).values()) for change, update in changes.items()}
    check_memory(least_bytes(config), memory_limit_bytes(), after)


def least_bytes(config: PPOConfig) -> dict[str, int]:
    """Return the bytes of each role's models on a machine without GPUs.

    Activations and caches are left out.
    """
    states = 0 if config.train.optimizer.name == "sgd" else 2
    precision = resolve_dtype(config.model.dtype).itemsize
    ranks = 1 if config.train.sharded else config.placement.policy.ranks // weight_parts(config.placement.policy)
    parts = {
        "policy": ranks * least_training_bytes(config.model, states=states),
        "rollout": config.rollout.replicas * precision * parameter_count(config.model),
    }
    if config.opponent_share:
        parts["rollout"] += config.rollout.replicas * precision * parameter_count(config.reference.model or config.model)
    if config.critic.kind == "separate":
        parts["critic"] = least_training_bytes(config.critic.model or config.model, states=states)
    if config.needs_reference and not config.reference_in_policy:
        parts["reference"] = _least_frozen_bytes(config.reference.model or config.model, precision)
    if (judge := config.reward.judge) is not None:
        parts["judge"] = judge.replicas * resolve_dtype(judge.model.dtype).itemsize * parameter_count(judge.model)
    if config.teacher is not None:
        parts["teacher"] = _least_frozen_bytes(config.teacher.model, precision)
    return parts


def _least_frozen_bytes(model: ModelSection, precision: int) -> int:
    """Return the bytes of frozen weights, which keep the dtype of their checkpoint."""
    return min(precision, checkpoint_dtype(model).itemsize) * parameter_count(model)
