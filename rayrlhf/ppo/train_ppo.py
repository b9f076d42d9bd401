"""The built-in PPO loop, and the check of a configuration without starting anything."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rayrlhf.config.loading.describe import describe
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.prompt_datasets import describe_columns
from rayrlhf.errors import UserError
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.open_trainer import open_trainer
from rayrlhf.ppo.run_models import describe_checks
from rayrlhf.ppo.start_checks import check_start
from rayrlhf.rewards.functions import load_functions
from rayrlhf.rewards.judgments import columns_read


@dataclass(frozen=True, slots=True)
class PPOResult:
    """Summary of a finished run; everything else is in its folder.

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
        UserError: see `check_start`.
    """
    _require_reward(config)
    checked = check_start(config)
    read = None if config.environment is not None else columns_read(config.reward, load_functions(config.reward))
    sets = [(config.data.train, checked.train)]
    if config.data.evaluation is not None and checked.held_out:
        sets.append((config.data.evaluation, checked.held_out))
    columns = [describe_columns(section, prompts, read) for section, prompts in sets]
    counts = f"prompts: {len(checked.train)} to train on, {len(checked.held_out)} held out"
    return "\n".join([describe(config), *describe_checks(config), *columns, counts, *checked.notes])


def train_ppo(config: PPOConfig, callbacks: Iterable[Callback] = ()) -> PPOResult:
    """Run PPO to `run.steps`, resuming from the newest checkpoint of the run folder.

    Args:
        config: the configuration, for example from `rayrlhf.load_config`.
        callbacks: called in addition to the built-in recorder.

    Raises:
        UserError: a mistake in the configuration, the data, the reward functions or the placement.
        AlarmError: a diagnostic ended the run.
        DeadlineError: a process did not respond in time.
        ActorLostError: too many processes were lost, too often in a row.
        StoppedError: SIGTERM or Ctrl-C stopped the run at the end of a step; the same call resumes it.
    """
    started = time.monotonic()
    _require_reward(config)
    with open_trainer(config, callbacks) as trainer:
        for _ in trainer.steps():
            with trainer.recovering():
                trainer.train_step()
        trainer.export()
    return PPOResult(trainer.folder, trainer.steps_done, time.monotonic() - started, trainer.peak_gib)


def _require_reward(config: PPOConfig) -> None:
    if not config.reward.configured:
        raise UserError(
            "reward.given_by_loop: the built-in loop has no rewards of its own: expected reward.functions, reward.model or "
            "reward.judge, or a loop over rayrlhf.open_trainer"
        )
