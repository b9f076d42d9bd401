"""A PPO run from start to end: check everything that can be checked cheaply, start the actors, train, leave no trace."""

import importlib.util
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import yaml

from rayrlhf.actors.connection import connected, running_crew
from rayrlhf.config.load import describe, differences, dump_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.prompts import load_prompt_dataset
from rayrlhf.data.records import Prompt
from rayrlhf.data.sampler import PromptSampler
from rayrlhf.engines.rollout import context_length
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_architecture, load_tokenizer
from rayrlhf.observe.live import LiveView
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from rayrlhf.ppo.recorder import GIB, Recorder
from rayrlhf.ppo.trainer import PPOTrainer
from rayrlhf.ppo.warmup import check_warmup, imitation_batch
from rayrlhf.rewards.functions import load_functions


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
        UserError: see `load_prompts` and `load_functions`; also a backend that is not installed.
    """
    _check_backend(config)
    load_functions(config.reward)
    train, evaluation = load_prompts(config)
    check_warmup(config, train)
    return f"{describe(config)}\nprompts: {len(train)} to train on, {len(evaluation)} held out"


def train_ppo(config: PPOConfig, callbacks: Iterable[Callback] = ()) -> PPOResult:
    """Run PPO to `run.steps`, resuming from the newest checkpoint of the run folder.

    Args:
        config: the configuration, for example from `rayrlhf.config.load.load_config`.
        callbacks: called beside the built-in recorder.

    Raises:
        UserError: a mistake in the configuration, the data, the reward functions or the placement.
        AlarmError: the run stopped itself.
        DeadlineError: something did not answer in time.
    """
    started = time.monotonic()
    _check_backend(config)
    load_functions(config.reward)
    view = LiveView(f"rayrlhf ppo {config.run.name}", live=None if config.observe.live else False)
    with ExitStack() as stack:
        stack.callback(view.stop)
        with view.wait("starting Ray and the actors"):
            stack.enter_context(connected(config.placement.address))
            crew = stack.enter_context(running_crew(config))
        with view.wait("reading the prompts"):
            train_prompts, evaluation_prompts = load_prompts(config)
            check_warmup(config, train_prompts)
        # Only a run that can start leaves a folder behind.
        recorder = stack.enter_context(Recorder(config, dump_config(config), stored_differences, view))
        with view.wait("loading the models"):
            crew.build(config.deadlines.start)
        sampler = PromptSampler(train_prompts, seed=config.run.seed, shuffle=config.data.shuffle)
        trainer = PPOTrainer(config, crew, sampler, evaluation_prompts, recorder.timer, callbacks=[recorder, *callbacks])
        _resume(trainer, recorder)
        _run(trainer, recorder, train_prompts)
    return PPOResult(recorder.folder.path, trainer.steps_done, time.monotonic() - started, recorder.memory.peak_bytes / GIB)


def stored_differences(stored: str, wanted: str) -> list[str]:
    """Lines that tell a run folder's configuration from the wanted one."""
    return differences(*(PPOConfig.model_validate(yaml.safe_load(text)) for text in (stored, wanted)))


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
    train = load_prompt_dataset(config.data.train, config.data, tokenizer, longest)
    if config.data.evaluation is None or not config.evaluation.enabled:
        return train, []
    held_out = load_prompt_dataset(config.data.evaluation, config.data, tokenizer, longest)
    return train, held_out[: config.evaluation.prompts]


def _check_backend(config: PPOConfig) -> None:
    if config.rollout.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "rollout.backend: vllm is not installed; expected `pip install 'rayrlhf[cpu]'` or `'rayrlhf[gpu]'`, "
            "or rollout.backend=transformers"
        )


def _resume(trainer: PPOTrainer, recorder: Recorder) -> None:
    """Continue from the newest complete checkpoint, if there is one and resuming is not switched off."""
    found = list_checkpoints(recorder.folder.checkpoints)
    if found and trainer.config.run.resume == "auto":
        with recorder.waiting(f"resuming from step {found[-1].step}"):
            state = load_checkpoint(found[-1], trainer.crew, trainer.config.deadlines.update)
            trainer.load_state(state)
    recorder.resume(trainer.steps_done)


def _run(trainer: PPOTrainer, recorder: Recorder, train_prompts: Sequence[Prompt]) -> None:
    config = trainer.config
    for callback in trainer.callbacks:
        callback.on_start(trainer)
    if trainer.steps_done == 0:
        _evaluate(trainer, recorder)
        _warm_up(trainer, recorder, train_prompts)
    while trainer.steps_done < config.run.steps:
        trainer.train_step()
        step = trainer.steps_done
        last = step == config.run.steps
        if last or (config.evaluation.every and step % config.evaluation.every == 0):
            _evaluate(trainer, recorder)
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            _checkpoint(trainer, recorder)
    with recorder.waiting("exporting the model"):
        trainer.export(recorder.folder.export)
    for callback in trainer.callbacks:
        callback.on_end(trainer)


def _warm_up(trainer: PPOTrainer, recorder: Recorder, train_prompts: Sequence[Prompt]) -> None:
    """Imitate the given responses, where the configuration asks for it."""
    if trainer.config.warmup is None:
        return
    batch = imitation_batch(trainer.config, train_prompts, load_tokenizer(trainer.config.model))
    with recorder.waiting(f"warming up on {len(batch)} given responses"):
        report = trainer.warm_up(batch)
    first, last = (report.step_metrics[index]["loss/imitation"] for index in (0, -1))
    recorder.note(f"warm-up: cross-entropy {first:.2f} -> {last:.2f} nats a token over {len(batch)} responses")


def _evaluate(trainer: PPOTrainer, recorder: Recorder) -> None:
    """Answer the held-out prompts, unless a run that this one resumes has done so at this step."""
    if trainer.evaluation_prompts and not recorder.has_evaluation(trainer.steps_done):
        with recorder.waiting(f"answering {len(trainer.evaluation_prompts)} held-out prompts"):
            trainer.evaluate()


def _checkpoint(trainer: PPOTrainer, recorder: Recorder) -> None:
    config = trainer.config
    with recorder.waiting("writing a checkpoint"):
        folder = save_checkpoint(
            recorder.folder.checkpoints,
            trainer.steps_done,
            trainer.crew,
            trainer.state(),
            config.checkpoint.keep,
            config.deadlines.update,
        )
    for callback in trainer.callbacks:
        callback.on_checkpoint(trainer.steps_done, folder)
