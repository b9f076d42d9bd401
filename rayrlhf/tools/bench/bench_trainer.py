"""Actors of a small PPO run without its loop, for benchmarks of single actors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from rayrlhf.actors.connection import connected, running_actor_groups
from rayrlhf.actors.model_loading import load_models
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.prompt_sampler import PromptSampler
from rayrlhf.data.records import Prompt
from rayrlhf.ppo.step_driver import StepDriver


def bench_config(overrides: Sequence[str]) -> PPOConfig:
    """Return a configuration without data, reference or critic; prompts are passed directly."""
    base = [
        "run.name=bench",
        "data.train.path=none",
        "reward.functions=[{name: format, arguments: {pattern: x}}]",
        "algorithm={kl: {coefficient: 0.0}, advantage: {estimator: reinforce}}",
    ]
    return load_config(PPOConfig, None, [*base, *overrides])


@contextmanager
def running_trainer(config: PPOConfig) -> Iterator[StepDriver]:
    """Start Ray and the actors with their models for the duration of the block."""
    with connected(config.placement.address), running_actor_groups(config) as actor_groups:
        load_models(actor_groups, config.deadlines.start)
        yield StepDriver(config, actor_groups, PromptSampler([Prompt(0, "", np.zeros(1, np.int32))], seed=0))
