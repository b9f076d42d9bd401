"""The built-in PPO loop, and the check of a configuration without starting anything."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rayrlhf.config.loading.describe import describe
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.open_trainer import check_plugins, open_trainer
from rayrlhf.ppo.run_prompts import load_prompts
from rayrlhf.ppo.sft_warmup import check_warmup


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
        UserError: see `load_prompts` and `load_functions`; also a backend that is not installed, or a wrong callback.
    """
    _require_reward(config)
    check_plugins(config)
    train, evaluation = load_prompts(config)
    check_warmup(config, train)
    return f"{describe(config)}\nprompts: {len(train)} to train on, {len(evaluation)} held out"


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
            "reward.given_by_loop: the built-in loop has no rewards of its own: expected reward.functions or reward.model, "
            "or a loop over rayrlhf.open_trainer"
        )
