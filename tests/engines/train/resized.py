"""A state that two ranks leave, one rank continues and two ranks take back, at every ZeRO stage."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.train import TrainSection
from rayrlhf.engines.objectives.policy import PolicyObjective, SharedObjective, ValueObjective
from rayrlhf.engines.train.backends import deepspeed as deepspeed_setup
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.spec import TrainEngineSpec
from tests.engines.training import random_batch, random_sequences, weights_of

STAGES = (0, 1, 2, 3)
SAMPLES = 6
OBJECTIVE = SharedObjective(PolicyObjective(), ValueObjective())
PLAN = UpdatePlan([[[0, 1, 2], [3, 4, 5]]])
SOME_ARE_SHARDED = 1500
"""Of the tiny model's parameters the larger ones have more elements, the smaller ones less."""


def engine_at(folder: Path, stage: int) -> TrainEngine:
    train = TrainSection(zero_stage=stage, max_grad_norm=0.5)
    model = ModelSection(path=str(folder / "model"), dtype="float32")
    return TrainEngine(TrainEngineSpec(model, frozenset({"lm", "value"}), train, 1e-3))


def step(engine: TrainEngine, number: int) -> None:
    engine.update(random_batch(random_sequences(SAMPLES, seed=number), seed=number), PLAN, OBJECTIVE)


def in_a_world_of_two(rank: int, folder: Path) -> None:
    """Three updates at every stage, the state kept after the first; then the third once more, from what one rank left."""
    deepspeed_setup.PARTITION_THRESHOLD = SOME_ARE_SHARDED
    for stage in STAGES:
        engine = engine_at(folder, stage)
        step(engine, 0)
        engine.save_state(folder / f"first-{stage}")
        step(engine, 1)
        step(engine, 2)
        torch.save(weights_of(engine), folder / f"undisturbed-{rank}-{stage}.pt")
    (folder / f"left-{rank}").touch()
    while not (folder / "returned").exists():
        time.sleep(0.05)
    for stage in STAGES:
        engine = engine_at(folder, stage)
        engine.load_state(folder / f"second-{stage}", resized=True)
        step(engine, 2)
        torch.save([engine.optimizer_steps, weights_of(engine)], folder / f"moved-{rank}-{stage}.pt")


def alone_in_between(folder: Path, others: Sequence[subprocess.Popen[bytes]]) -> None:
    """The second update, in this process, once the world of two has left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed_setup, "PARTITION_THRESHOLD", SOME_ARE_SHARDED)
        while not all((folder / f"left-{rank}").exists() for rank in range(2)) and all(p.poll() is None for p in others):
            time.sleep(0.05)
        try:
            for stage in STAGES:
                engine = engine_at(folder, stage)
                engine.load_state(folder / f"first-{stage}", resized=True)
                step(engine, 1)
                engine.save_state(folder / f"second-{stage}")
        finally:
            (folder / "returned").touch()
