"""Opens a trainer: Ray, actors, prompts, models, run folder, resume."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.connection import connected, running_actor_groups
from rayrlhf.actors.fault_tolerance import monitored, retry_policy
from rayrlhf.actors.heartbeat import HeartbeatMonitor
from rayrlhf.actors.model_loading import load_models
from rayrlhf.actors.waiting import pending_calls
from rayrlhf.config.loading.describe import warnings
from rayrlhf.config.loading.load import dump_config, load_config, load_tree
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.section import GIB
from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.errors import ActorLostError, DeadlineError
from rayrlhf.observe.host_facts import record_model_checks
from rayrlhf.observe.live import LiveView
from rayrlhf.observe.loop_control import stop_requests
from rayrlhf.observe.vitals import Vitals
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.checkpoint import Checkpointer
from rayrlhf.ppo.cluster_metrics import ClusterMetrics
from rayrlhf.ppo.run_identity import fingerprint, stored_differences
from rayrlhf.ppo.run_loop import RunLoop
from rayrlhf.ppo.run_recorder import Recorder
from rayrlhf.ppo.start_checks import check_start
from rayrlhf.ppo.step_driver import StepDriver
from rayrlhf.ppo.trainer import PPOTrainer
from rayrlhf.storage.mirror import Mirror


@contextmanager
def open_trainer(
    config: PPOConfig | Path | str | Mapping[str, Any], callbacks: Iterable[Callback] = ()
) -> Iterator[PPOTrainer]:
    """Open the trainer of a run for a loop of your own.

    The actors end with the block. The run folder is created, or continued from its newest checkpoint. One process at a time may
    hold it.

    Args:
        config: a configuration, the path of a YAML file, or the same tree as a dict.
        callbacks: called in addition to the built-in recorder, which writes metrics, samples and the trace.

    Yields:
        The trainer, with all models loaded; `steps_done` is above 0 where it resumed.

    Raises:
        UserError: a mistake in the configuration, the data, the reward functions or the placement.
        DeadlineError: a process did not start in time.
    """
    config = _resolved(config)
    view = LiveView(f"rayrlhf ppo {config.run.name}", live=None if config.observe.live else False)
    with ExitStack() as stack:
        stack.callback(view.stop)
        for line in warnings(config):
            view.note(line)
        stop = stack.enter_context(stop_requests(config.recovery.stop_seconds))
        with view.wait("reading the prompts, checking the configuration"):
            train_prompts, evaluation_prompts, configured_callbacks, notes = check_start(config)
        for line in notes:
            view.note(line)
        with view.wait("starting Ray and the actors"):
            stack.enter_context(connected(config.placement.address))
            actor_groups = stack.enter_context(running_actor_groups(config, view.note))
        mirror = _open_mirror(config)
        # Only a run that can start leaves a folder.
        recorder = stack.enter_context(Recorder(config, dump_config(config), stored_differences, view))
        _load_models(config, actor_groups, recorder, view)
        watched = monitored(config, actor_groups, recorder.recovery, recorder.user_output, recorder.stacks)
        tolerance = stack.enter_context(watched)
        driver = StepDriver(
            config,
            actor_groups,
            PromptSampler(train_prompts, seed=config.run.seed, shuffle=config.data.shuffle),
            evaluation_prompts,
            recorder.timer,
            callbacks=[recorder, ClusterMetrics(config.run.name), *callbacks, *(make() for make in configured_callbacks)],
            fault_tolerance=tolerance,
            observer=recorder.flight,
        )
        stack.enter_context(Vitals(recorder.folder.path, partial(_vitals, driver, recorder)))
        stack.enter_context(_stacks_kept(tolerance.monitor, recorder))
        loop = RunLoop(driver, recorder, _checkpointer(config, actor_groups, recorder, mirror), train_prompts, stop)
        loop.resume()
        trainer = PPOTrainer(driver, loop, recorder)
        for callback in driver.callbacks:
            callback.on_start(trainer)
        yield trainer
        loop.finish_checkpoint()
        for callback in driver.callbacks:
            callback.on_end(trainer)


def _resolved(config: PPOConfig | Path | str | Mapping[str, Any]) -> PPOConfig:
    if isinstance(config, PPOConfig):
        return config
    if isinstance(config, Mapping):
        return load_tree(PPOConfig, dict(config), None, "config")
    return load_config(PPOConfig, config)


def _load_models(config: PPOConfig, actor_groups: ActorGroups, recorder: Recorder, view: LiveView) -> None:
    """Load all models, and record the outcome of each one's check."""
    section, seconds = config.recovery, config.deadlines.start
    retry = retry_policy(section) if section.enabled else None
    with view.wait("loading the models"), ExitStack() as stack:
        monitor = None
        if retry is not None:
            monitor = stack.enter_context(
                HeartbeatMonitor(retry, section.ping_every, recorder.recovery, recorder.user_output, recorder.stacks)
            )
        stack.enter_context(_stacks_kept(monitor, recorder))
        checks = load_models(actor_groups, seconds, retry, recorder.recovery, monitor)
    record_model_checks(recorder.folder.path, checks)
    for role, line in checks.items():
        view.note(f"{role}: {line}")


def _checkpointer(config: PPOConfig, actor_groups: ActorGroups, recorder: Recorder, mirror: Mirror | None) -> Checkpointer:
    folder, seconds = recorder.folder.checkpoints, config.deadlines.update
    return Checkpointer(folder, actor_groups, config.checkpoint, fingerprint(config), seconds, mirror)


def _vitals(driver: StepDriver, recorder: Recorder) -> dict[str, Any]:
    """Return the run's part of a line of `vitals.jsonl`."""
    monitor = driver.fault_tolerance.monitor
    actors = {} if monitor is None else monitor.vitals()
    resident = round(recorder.memory.resident_bytes / GIB, 3)
    return {**driver.vitals(), "waits": pending_calls(), "resident_gib": resident, "actors": actors}


@contextmanager
def _stacks_kept(monitor: HeartbeatMonitor | None, recorder: Recorder) -> Iterator[None]:
    """Keep the stacks of all processes if one is lost or silent."""
    try:
        yield
    except (DeadlineError, ActorLostError):
        for actor, text in ({} if monitor is None else monitor.stacks()).items():
            recorder.stacks(actor, text)
        raise


def _open_mirror(config: PPOConfig) -> Mirror | None:
    """Open the storage that checkpoints are copied to; it holds this run or none."""
    if config.checkpoint.mirror is None:
        return None
    mirror = Mirror(config.checkpoint.mirror, config.run.name)
    mirror.claim(dump_config(config), stored_differences, resume=config.run.resume == "auto")
    return mirror
