"""`rayrlhf bench score`: both trainers get the same task, and the clock counts training alone."""

import json
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_tokenizer
from rayrlhf.models.model_path import resolve_path
from rayrlhf.ppo.run_prompts import load_prompts
from rayrlhf.tools.bench import time_to_score as module
from rayrlhf.tools.bench.time_to_score import Clock, Curve, ScoreWork, bench_score, lora_settings, trl_rows, trl_settings

WORK = ScoreWork("float32", target=0.4, steps=16, every=2)


@pytest.fixture
def config(tmp_path: Path):
    return WORK.config(3, tmp_path)


def test_trl_takes_the_samples_and_optimizer_steps_of_our_configuration(config, tmp_path):
    from trl.trainer.grpo_config import GRPOConfig

    theirs = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **trl_settings(config))
    assert theirs.generation_batch_size == config.samples_per_step == 64
    assert theirs.generation_batch_size // theirs.num_generations == config.rollout.prompts_per_step
    assert theirs.max_steps == 16 * 64 // config.mini_batch_size
    assert (theirs.learning_rate, theirs.beta, theirs.temperature) == (5e-4, 0.005, 0.8)
    assert (theirs.lr_scheduler_type, theirs.warmup_steps, theirs.seed) == ("constant", 0, 3)
    assert (theirs.loss_type, theirs.scale_rewards, theirs.num_iterations) == ("grpo", "group", 1)
    assert (theirs.adam_beta1, theirs.adam_beta2, theirs.weight_decay, theirs.max_grad_norm) == (0.9, 0.95, 0.0, 1.0)
    assert not theirs.use_vllm


def test_trl_trains_as_many_adapter_weights_as_we_do(config):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from rayrlhf.models.lora import add_lora

    sizes = []
    for add in (
        lambda network: get_peft_model(network, LoraConfig(**lora_settings(config.model.lora, network))),
        lambda network: add_lora(network, config.model.lora, seed=0),
    ):
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve_path(config.model)))
        add(network)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        sizes.append((len(trained), sum(parameter.numel() for parameter in trained)))
    assert sizes[0] == sizes[1]


def test_trls_rows_have_our_tokens(config):
    train, held_out = load_prompts(config)
    tokenizer = load_tokenizer(config.model)
    for prompt, row in zip(held_out, trl_rows(held_out, config), strict=True):
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True)
        assert ids["input_ids"] == prompt.token_ids.tolist()
    assert len(train) > 16 * config.rollout.prompts_per_step


def test_the_clock_stands_still_during_evaluations(monkeypatch):
    now = iter([100.0, 107.0, 150.0, 160.0, 200.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    for step in (0, 2):
        clock.stop()
        clock.record(step, step / 10)
    assert clock.curve.points == [(0, 7.0, 0.0), (2, 17.0, 0.2)]
    assert clock.curve.reached(0.1) == (2, 17.0, 0.2)
    assert clock.curve.reached(0.3) is None


def test_times_are_compared_with_and_without_the_start(monkeypatch):
    curves = {
        module._run_trl: Curve([(0, 10.0, 0.1), (2, 60.0, 0.3), (4, 110.0, 0.5)]),
        module._run_ours: Curve([(0, 30.0, 0.1), (2, 50.0, 0.45)]),
    }
    monkeypatch.setattr(module, "in_new_process", lambda function, work, seed: curves[function])
    lines = []
    whole, steps = bench_score(WORK, rounds=2, progress=lines.append)
    assert (whole.ratio("rayrlhf").median, steps.ratio("rayrlhf").median) == (110 / 50, 100 / 20)
    assert [line.split(":")[0] for line in lines] == ["seed 0", "seed 0", "seed 1", "seed 1"]
    assert "step 4 at 110 s: 0.500" in lines[0]
    with pytest.raises(UserError, match=r"TRL \S+ GRPOTrainer did not reach 0.9 in 16 steps; expected more --steps"):
        bench_score(ScoreWork("float32", target=0.9, steps=16, every=2), rounds=1)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_command_races_both_trainers(tmp_path):
    arguments = ["bench", "score", "--precision", "float32", "--target", "0.35", "--rounds", "1", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    whole, steps = json.loads((tmp_path / "score.json").read_text())
    assert whole["ratios"]["rayrlhf"][0] > 0
    assert steps["ratios"]["rayrlhf"][0] > 0
