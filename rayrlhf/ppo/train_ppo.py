"""A PPO run from start to end: check everything that can be checked cheaply, start the actors, train, leave no trace."""

import json
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.actors.connection import connected, running_actor_groups
from rayrlhf.actors.fault_tolerance import monitored
from rayrlhf.config.loading.describe import describe, warnings
from rayrlhf.config.loading.load import differences, dump_config, stored_config
from rayrlhf.config.model import ModelSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.units import GIB
from rayrlhf.data.prompt_datasets import load_prompt_dataset
from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.data.records import Prompt
from rayrlhf.demonstrations.prompt_demonstrations import PromptDemonstrations
from rayrlhf.engines.rollout.common import context_length
from rayrlhf.engines.rollout.factory import check_rollout_backend
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_architecture, load_tokenizer
from rayrlhf.observe.live import LiveView
from rayrlhf.observe.loop_control import stop_requests
from rayrlhf.observe.trackers import check_trackers
from rayrlhf.ppo.callbacks import Callback, resolve_callbacks
from rayrlhf.ppo.checkpoint import Checkpointer
from rayrlhf.ppo.cluster_metrics import ClusterMetrics
from rayrlhf.ppo.run_loop import RunLoop
from rayrlhf.ppo.run_recorder import Recorder
from rayrlhf.ppo.sft_warmup import check_warmup
from rayrlhf.ppo.trainer import PPOTrainer
from rayrlhf.ppo.update_objectives import check_algorithm
from rayrlhf.rewards.functions import load_functions
from rayrlhf.storage.mirror import Mirror

MAY_CHANGE = ("run.root:", "placement.", "rollout.replicas:", "deadlines.", "recovery.", "observe.", "checkpoint.mirror:")
"""Settings of where and how a run is carried out, which a resumed one may have otherwise."""


@dataclass(frozen=True, slots=True)
class PPOResult:
    """What a finished run leaves; everything else is in its folder.

    Attributes:
        folder: the run folder.
        steps: PPO steps done, those before a resume included.
        seconds: wall time of this call, start-up and export included.
        peak_gib: largest memory of all processes of the run together, shared pages counted once.
    """

    folder: Path
    steps: int
    seconds: float
    peak_gib: float


def check_ppo(config: PPOConfig) -> str:
    """Check a configuration without starting anything; returns the plan in words.

    Raises:
        UserError: see `load_prompts` and `load_functions`; also a backend that is not installed, or a wrong callback.
    """
    _check_plugins(config)
    train, evaluation = load_prompts(config)
    check_warmup(config, train)
    return f"{describe(config)}\nprompts: {len(train)} to train on, {len(evaluation)} held out"


def train_ppo(config: PPOConfig, callbacks: Iterable[Callback] = ()) -> PPOResult:
    """Run PPO to `run.steps`, resuming from the newest checkpoint of the run folder.

    Args:
        config: the configuration, for example from `rayrlhf.config.loading.load.load_config`.
        callbacks: called beside the built-in recorder.

    Raises:
        UserError: a mistake in the configuration, the data, the reward functions or the placement.
        AlarmError: the run stopped itself.
        DeadlineError: something did not answer in time.
        ActorLostError: too many processes were lost, too often in a row.
        StoppedError: SIGTERM or Ctrl-C asked the run to stop; it did so at a step's end, and the same call resumes it.
    """
    started = time.monotonic()
    own_callbacks = _check_plugins(config)
    view = LiveView(f"rayrlhf ppo {config.run.name}", live=None if config.observe.live else False)
    with ExitStack() as stack:
        stack.callback(view.stop)
        for line in warnings(config):
            view.note(line)
        with view.wait("starting Ray and the actors"):
            stack.enter_context(connected(config.placement.address))
            stop = stack.enter_context(stop_requests())
            actor_groups = stack.enter_context(running_actor_groups(config))
        with view.wait("reading the prompts"):
            train_prompts, evaluation_prompts = load_prompts(config)
            check_warmup(config, train_prompts)
        mirror = _open_mirror(config)
        # Only a run that can start leaves a folder behind.
        recorder = stack.enter_context(Recorder(config, dump_config(config), stored_differences, view))
        with view.wait("loading the models"):
            actor_groups.build(config.deadlines.start)
        sampler = PromptSampler(train_prompts, seed=config.run.seed, shuffle=config.data.shuffle)
        fault_tolerance = stack.enter_context(monitored(config, actor_groups, recorder.recovery))
        gauges = ClusterMetrics(config.run.name)
        trainer = PPOTrainer(
            config,
            actor_groups,
            sampler,
            evaluation_prompts,
            recorder.timer,
            callbacks=[recorder, gauges, *callbacks, *(make() for make in own_callbacks)],
            fault_tolerance=fault_tolerance,
        )
        checkpointer = Checkpointer(
            recorder.folder.checkpoints, actor_groups, config.checkpoint, fingerprint(config), config.deadlines.update, mirror
        )
        RunLoop(trainer, recorder, checkpointer, train_prompts, stop).run()
    return PPOResult(recorder.folder.path, trainer.steps_done, time.monotonic() - started, recorder.memory.peak_bytes / GIB)


def _open_mirror(config: PPOConfig) -> Mirror | None:
    """The storage that checkpoints are copied to; it holds this run or none."""
    if config.checkpoint.mirror is None:
        return None
    mirror = Mirror(config.checkpoint.mirror, config.run.name)
    mirror.claim(dump_config(config), stored_differences, resume=config.run.resume == "auto")
    return mirror


def stored_differences(stored: str, wanted: str) -> list[str]:
    """Lines that tell a run folder's configuration from the wanted one, as far as they make it another run.

    A run may go on elsewhere and on more or fewer processes; one that is `exact` may not, because its bits depend on them.
    """
    before, after = (stored_config(PPOConfig, text) for text in (stored, wanted))
    found = differences(before, after)
    if "exact" in (before.run.determinism, after.run.determinism):
        return found
    return [line for line in found if not line.startswith(MAY_CHANGE)]


def load_prompts(config: PPOConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts and the fixed held-out prompts, tokenised.

    Raises:
        UserError: a file, row, field, template or prompt length is not as it must be.
    """
    tokenizer = load_tokenizer(config.model)
    context = context_length(config.rollout, load_architecture(config.model))
    longest = config.data.max_prompt_tokens or context - config.rollout.max_new_tokens
    if longest < 1 or longest + config.rollout.max_new_tokens > context:
        raise UserError(
            f"rollout.max_new_tokens {config.rollout.max_new_tokens} and data.max_prompt_tokens {longest} exceed "
            f"the {context} tokens of the model's context (rollout.max_model_length)"
        )
    shown = config.rollout.demonstrations
    demonstrator = PromptDemonstrations(shown, config.data, tokenizer, longest, config.run.seed) if shown is not None else None
    train = load_prompt_dataset(config.data.train, config.data, tokenizer, longest)
    if demonstrator is not None:
        train = demonstrator.show(config.data.train, train)
    if config.data.evaluation is None or not config.evaluation.enabled:
        return train, []
    held_out = load_prompt_dataset(config.data.evaluation, config.data, tokenizer, longest)[: config.evaluation.prompts]
    if demonstrator is not None and not config.trains_without_demonstrations:
        held_out = demonstrator.show(config.data.evaluation, held_out)
    return train, held_out


def _check_plugins(config: PPOConfig) -> list[Callable[[], Callback]]:
    """Check backends, reward functions, losses and callbacks; returns the constructors of `observe.callbacks`."""
    check_trackers(config.observe.trackers)
    check_rollout_backend(config.rollout)
    load_functions(config.reward)
    check_algorithm(config.algorithm)
    return resolve_callbacks(config.observe.callbacks)


def fingerprint(config: PPOConfig) -> dict[str, str]:
    """What two runs must agree on to load each other's training state: networks, heads, adapters, optimizer, ZeRO stage."""
    parts: dict[str, Any] = {"model": _shape(config.model), "critic.kind": config.critic.kind}
    if config.critic.kind == "separate":
        parts["critic.model"] = _shape(config.critic.model or config.model)
    parts |= {
        "model.lora": config.model.lora.model_dump(mode="json") if config.model.lora else None,
        "train.optimizer.name": config.train.optimizer.name,
    } | config.train.sharding_fingerprint()
    return {key: json.dumps(value, sort_keys=True) for key, value in parts.items()}


def _shape(model: ModelSection) -> dict[str, Any]:
    architecture = load_architecture(model)
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(architecture, name, None) for name in (*names, "num_key_value_heads", "tie_word_embeddings")}
