"""The moving average of the weights: its closed form, its export, and that a resumed run continues it bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.train import OptimizerSection, TrainSection
from rayrlhf.engines.objectives.supervised import CrossEntropyObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.errors import UserError
from tests.engines.training import random_batch, random_sequences

DECAY = 0.6
MODEL = "builtin:tiny?layers=1&hidden=64&context=64"

pytestmark = pytest.mark.usefixtures("alone")


def engine_of(*, decay=DECAY, stage=0, lora=None, heads=frozenset({"lm"})):
    train = TrainSection(ema_decay=decay, zero_stage=stage, optimizer=OptimizerSection(name="adamw"))
    return TrainEngine(TrainEngineSpec(ModelSection(path=MODEL, dtype="float32", lora=lora), heads, train, 1e-2))


def take(engine, seed):
    batch = random_batch(random_sequences(4, seed), seed)
    engine.update(batch, UpdatePlan([[list(range(len(batch)))]]), CrossEntropyObjective())


def weights(engine):
    return {name: tensor.clone() for bucket in engine.weight_buckets() for name, tensor in bucket}


@pytest.mark.parametrize("stage", [0, 2])
def test_the_average_is_its_closed_form_over_all_steps_and_is_exported_next_to_the_weights(tmp_path, stage):
    engine = engine_of(stage=stage)
    seen = [weights(engine)]
    for step in range(4):
        take(engine, step)
        seen.append(weights(engine))
    engine.export(tmp_path / "export")
    average = load_file(tmp_path / "export-average" / "model.safetensors")
    shares = [DECAY**4, *((1 - DECAY) * DECAY ** (4 - step) for step in range(1, 5))]
    for name, tensor in average.items():
        expected = sum(share * state[name].double() for share, state in zip(shares, seen, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
    own = load_file(tmp_path / "export" / "model.safetensors")
    assert all(torch.equal(own[name], seen[-1][name]) for name in own)
    assert any(not torch.equal(own[name], average[name]) for name in own)
    assert all(torch.equal(tensor, seen[-1][name]) for name, tensor in weights(engine).items())


@pytest.mark.parametrize("resized", [False, True], ids=["same ranks", "other ranks"])
def test_a_resumed_run_continues_the_average_bit_for_bit(tmp_path, resized):
    whole = engine_of()
    for step in range(2):
        take(whole, step)
    (tmp_path / "state").mkdir()
    whole.save_state(tmp_path / "state")
    resumed = engine_of()
    resumed.load_state(tmp_path / "state", resized=resized)
    for engine, name in ((whole, "whole"), (resumed, "resumed")):
        take(engine, 7)
        engine.export(tmp_path / name)
    first, second = (load_file(tmp_path / f"{name}-average" / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_state_without_an_average_is_refused(tmp_path):
    (tmp_path / "state").mkdir()
    engine_of(decay=None).save_state(tmp_path / "state")
    with pytest.raises(UserError, match="no moving average in it"):
        engine_of().load_state(tmp_path / "state")


def test_of_adapters_the_average_folds_in_averaged_factors_over_the_untouched_base(tmp_path):
    engine = engine_of(lora=LoraSection(rank=2))
    base = weights(engine)
    take(engine, 0)
    take(engine, 1)
    engine.export(tmp_path / "export")
    average = load_file(tmp_path / "export-average" / "model.safetensors")
    moved = [name for name in average if not torch.equal(average[name], base[name])]
    assert moved
    assert all("proj" in name for name in moved)


def test_a_critic_has_no_average_and_sharded_weights_are_refused(tmp_path):
    engine = engine_of(heads=frozenset({"value"}))
    engine.export(tmp_path / "critic")
    assert not (tmp_path / "critic-average").exists()
    minimal = [f"model.path={MODEL}", "data.train.path=builtin:sums", "reward.functions=[{name: gsm8k}]", "run.steps=1"]
    with pytest.raises(UserError, match=r"ema_decay 0\.9 needs whole weights"):
        load_config(PPOConfig, None, [*minimal, "train.ema_decay=0.9", "train.zero_stage=3"])
