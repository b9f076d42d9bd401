"""What `rayrlhf bench ppo` gives its contenders, and one whole comparison of small ones."""

import numpy as np
import pytest

from rayrlhf.config.model import CriticSection, ModelSection
from rayrlhf.errors import UserError
from rayrlhf.models.builtin import resolve_model
from rayrlhf.tools.bench.bench_commands import bench_ppo_command
from rayrlhf.tools.bench.ppo_step import PLAIN, bench_ppo, write_reward_model
from rayrlhf.tools.bench.work import PPOWork


def test_every_contender_gets_the_same_prompts_of_the_stated_lengths():
    work = PPOWork(resolve_model("builtin:tiny?layers=1&hidden=64"), "reward", "float32", updates=2)
    ids = work.token_ids()
    lengths = np.array([len(one) for one in ids])
    assert len(ids) == 64 * 3
    assert lengths.min() >= work.characters[0] - 1  # a space at the cut is left out
    assert lengths.max() <= work.characters[1]
    assert ids == work.token_ids()
    assert [len(text) for text in work.texts()] == lengths.tolist()


def test_our_side_has_all_models_and_takes_one_optimizer_step_an_epoch(tmp_path):
    work = PPOWork("policy", "reward", "bfloat16", epochs=3)
    config = work.config("separate", tmp_path)
    assert config.updates_per_step == 3
    assert config.needs_reference
    assert config.critic == CriticSection(kind="separate", model=ModelSection(path="policy", dtype="bfloat16"))
    assert config.reward.model is not None
    assert config.reward.model.model.dtype == config.model.dtype == "bfloat16"
    assert work.config("shared", tmp_path).critic.kind == "shared"


def test_adapters_are_on_the_policy_alone(tmp_path):
    config = PPOWork("policy", "reward", "float32", lora=8).config("separate", tmp_path)
    assert config.model.lora is not None
    assert config.model.lora.rank == 8
    assert config.critic.model is not None
    assert config.critic.model.lora is None
    assert config.reference_in_policy


def test_a_run_is_recorded_as_asked(tmp_path):
    assert PPOWork("policy", "reward", "float32").config("shared", tmp_path).observe.record == "off"
    assert PPOWork("policy", "reward", "float32", record="light").config("shared", tmp_path).observe.record == "light"


def test_an_unknown_precision_is_one_line():
    with pytest.raises(UserError, match="--precision float8: expected float32 or bfloat16"):
        bench_ppo_command(["float8"], rounds=1, updates=1)


@pytest.mark.nightly
def test_trl_the_bare_calls_and_ours_are_measured_side_by_side(tmp_path):
    policy, reward = write_reward_model("builtin:tiny?layers=1&hidden=64", tmp_path / "reward")
    work = PPOWork(policy, reward, "float32", prompts=8, new_tokens=8, epochs=2, updates=1)
    found = bench_ppo(work, critics=("shared",), rounds=1)
    speeds = found.comparison.speeds
    assert list(speeds) == ["TRL 1.12.0 PPOTrainer", PLAIN, "rayrlhf, shared critic"]
    assert all(speed > 0 for (speed,) in speeds.values())
    assert {"generate", "reference", "update_policy"} <= found.seconds["rayrlhf, shared critic"].keys()
    assert found.seconds[PLAIN].keys() == found.operations[PLAIN].keys()
    assert "| update_policy |" in found.as_markdown()
