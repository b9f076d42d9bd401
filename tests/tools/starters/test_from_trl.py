"""Configurations of TRL become files that load, with the values of TRL and a comment for what has no equivalent."""

import dataclasses
import inspect
import re

import pytest
import transformers
import trl
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.config.loading.kinds import config_class
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.loading.problems import known_keys
from rayrlhf.errors import UserError
from rayrlhf.tools.starters.from_trl import starter_from_trl
from rayrlhf.tools.starters.trl_fields import CONVERTED, DEFAULTS, KEYS, REASONS, TASKS
from tests.test_docs import CLASSIC, MODERN

GRPO = """
from trl import GRPOConfig, GRPOTrainer
args = GRPOConfig(
    output_dir="out/first", learning_rate=3e-6, per_device_train_batch_size=4, gradient_accumulation_steps=8,
    num_generations=16, steps_per_generation=16, num_iterations=2, max_steps=400, max_completion_length=200, beta=0.04,
    epsilon=0.1, epsilon_high=0.28, loss_type="dr_grpo", scale_rewards="none", mask_truncated_completions=True,
    reward_weights=[1.0, 0.5], top_p=0.9,
    lr_scheduler_type="constant_with_warmup", warmup_steps=7, sync_ref_model=True, seed=SEED, **more,
)
"""


def converted(source, task, tmp_path):
    own, text = starter_from_trl(source, task, None)
    path = tmp_path / "file.yaml"
    path.write_text(text)
    return text, load_config(config_class(own), path)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "ClassicPPOConfig"])
def test_the_defaults_of_every_class_load(name, tmp_path):
    text, config = converted(f"{name}()", None, tmp_path)
    assert text.startswith(f"# From TRL's {name}: rayrlhf {TASKS[name]} FILE")
    assert config.train.optimizer.betas == (0.9, 0.999)
    assert config.train.schedule.shape == "linear"


def test_a_grpo_script_becomes_the_same_run(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(GRPO)
    text, config = converted(str(script), None, tmp_path)
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt, config.train.mini_batch_size) == (4, 16, 32)
    assert (config.run.steps, config.train.epochs, str(config.run.folder)) == (
        100,
        2,
        "out/first",
    )  # 400 / (2 halves x 2 passes)
    assert (config.algorithm.kl.coefficient, config.algorithm.kl.estimator, config.algorithm.kl.placement) == (
        0.04,
        "k3",
        "loss",
    )
    loss = config.algorithm.policy_loss
    assert (loss.name, loss.clip_low, loss.clip_high, loss.loss_aggregation) == ("ppo", 0.1, 0.28, "constant")
    assert (config.algorithm.advantage.estimator, config.algorithm.shaping.truncated) == ("dr_grpo", "mask")
    assert (config.train.schedule.shape, config.train.schedule.warmup_steps) == ("constant", 7)
    for line in (
        "# reward_weights: set reward.functions.*.weight, one for each function",
        "# top_p: responses are sampled from the full distribution, because log-probs are taken of it",
        "# sync_ref_model: the reference stays the initial model; begin another run with --from to renew it",
        "# seed: not a plain value; set its key by hand",
        "# **more: not a plain value; set its key by hand",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("source", "task", "expected"),
    [
        ("GRPOConfig(loss_type='cispo', epsilon_high=5.0)", None, ("algorithm.policy_loss.clip_high", 4.0)),
        ("GRPOConfig(importance_sampling_level='sequence', epsilon=3e-4)", "ppo", ("algorithm.policy_loss.name", "gspo")),
        ('{"ppo_epochs": 2, "batch_size": 64, "mini_batch_size": 16, "steps": 640}', "ppo", ("run.steps", 10)),
        ("init_kl_coef=0.1, adap_kl_ctrl=False", "ppo", ("algorithm.kl.target", None)),
        ("PPOConfig(total_episodes=1000, per_device_train_batch_size=10)", None, ("run.steps", 100)),
        ("PPOConfig(reward_model_path='m', cliprange=0.3)", None, ("algorithm.policy_loss.clip_high", 0.3)),
        ("max_length=77, packing=True", "sft", ("data.max_length", 77)),
        ("SFTConfig(max_steps=9)", None, ("train.steps", 9)),
        ("center_rewards_coefficient=0.01", "reward", ("train.center_coefficient", 0.01)),
        ('{"loss_type": ["ipo"], "beta": 0.3, "bf16": true}', "dpo", ("train.loss", "ipo")),
    ],
)
def test_values_reach_their_keys(source, task, expected, tmp_path):
    _, config = converted(source, task, tmp_path)
    for part in expected[0].split("."):
        config = getattr(config, part)
    assert config == expected[1]


@pytest.mark.parametrize(
    ("source", "task", "message"),
    [
        ("beta=0.1", None, "do not name the class; expected a TASK"),
        ("GRPOConfig()", "sft", "GRPOConfig is a configuration of the task ppo, found the task sft"),
        ("no/such/train.py", None, "No such file"),
        ("GRPOConfig(beta=", None, "neither JSON nor Python"),
        ("[GRPOConfig(), SFTConfig()]", None, "found 2 configurations"),
        ("beta=0.1", "presft", "no configuration of the task presft; expected ppo, sft, reward or dpo"),
    ],
)
def test_a_source_without_a_configuration_is_one_line(source, task, message):
    with pytest.raises(UserError, match=message):
        starter_from_trl(source, task, None)


@pytest.mark.parametrize(
    "source",
    [
        "GRPOConfig(beta=0.1, epsilon=0.1, loss_type='dr_grpo', scale_rewards='none', generation_batch_size=64, max_steps=9)",
        "PPOConfig(total_episodes=10, cliprange=0.1, kl_coef=0.1)",
        "PPOConfig(steps=128, adap_kl_ctrl=False, cliprange=0.3, early_stopping=True, target_kl=0.1, kl_penalty='abs')",
        "SFTConfig(num_train_epochs=2, loss_type='nll')",
        "DPOConfig(loss_type='ipo', num_train_epochs=1)",
    ],
)
def test_a_field_that_is_converted_has_no_comment(source, tmp_path):
    text, _ = converted(source, None, tmp_path)
    fields = re.findall(r"(\w+)=", source)
    assert [field for field in fields if f"# {field}:" in text] == []


def test_every_field_of_grpo_has_a_key_or_a_reason():
    own = {field.name for field in dataclasses.fields(trl.GRPOConfig)} - set(
        inspect.signature(transformers.TrainingArguments).parameters
    )
    assert own - CONVERTED["GRPOConfig"] - KEYS["GRPOConfig"].keys() - REASONS.keys() == set()
    assert len(own) > 60


@pytest.mark.parametrize("name", KEYS)
def test_every_key_is_one_and_every_field_is_trls(name):
    known = set(known_keys(config_class(TASKS[name]), tree={"algorithm": {"policy_loss": {"name": "ppo"}}}))
    assert set(KEYS[name].values()) - known == set()
    if "PPO" in name:
        common = set(inspect.signature(trl.SFTConfig).parameters)
        fields = set((CLASSIC + " " + MODERN).split()) | common | {"exp_name", "query_dataset"}
    else:
        fields = {field.name for field in dataclasses.fields(getattr(trl, name))}
        defaults = {field.name: field.default for field in dataclasses.fields(getattr(trl, name))}
        assert {field: defaults[field] for field in DEFAULTS[name]} == DEFAULTS[name]
    assert set(KEYS[name]) - fields == set()


def test_the_command_writes_a_file_and_names_the_next_command(tmp_path):
    target = tmp_path / "grpo.yaml"
    arguments = ["init", "ppo", str(target), "--from-trl", "GRPOConfig(beta=0.04)", "--model", "builtin:tiny"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert f"rayrlhf ppo {target} --dry-run" in result.output
    assert load_config(config_class("ppo"), target).model.path == "builtin:tiny"
    assert isinstance(CliRunner().invoke(app, arguments).exception, UserError), "an existing file is kept"
