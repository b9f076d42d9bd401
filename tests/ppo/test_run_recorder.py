"""What the recorder leaves of a step in the run folder, without a cluster."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rayrlhf.config.loading.load import dump_config, load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.data.records import Prompt, Rollout, SampleKey, TokenScores
from rayrlhf.observe.live import LiveView
from rayrlhf.observe.samples import read_samples
from rayrlhf.ppo.run_recorder import Recorder
from rayrlhf.ppo.scoring import ScoredRollouts
from rayrlhf.rewards.score import RewardBatch
from rayrlhf.tools.report.run_view import read_run

IDS = np.array([10, 11, 12], np.int32)


def scored(**logprobs: list[float]) -> ScoredRollouts:
    rollouts = tuple(
        Rollout(
            key=SampleKey(1, number, 0),
            prompt_ids=IDS,
            response_ids=IDS,
            action_mask=np.ones(3, bool),
            logprobs=np.full(3, -1.0, np.float32),
            versions=np.ones(3, np.int32),
            finish_reason="stop",
            text="text",
            seed=0,
        )
        for number in range(2)
    )
    forward_passes = {name: [TokenScores(logprobs=np.array(values, np.float32))] * 2 for name, values in logprobs.items()}
    prompts = {number: Prompt(number, f"prompt {number}", IDS) for number in range(2)}
    return ScoredRollouts(rollouts, RewardBatch(scores=torch.tensor([0.5, 1.5]), parts={}), forward_passes, prompts)


@pytest.fixture
def config(tmp_path: Path) -> PPOConfig:
    settings = [
        "model.path=builtin:tiny",
        "data.train.path=none",
        "reward.functions=[{name: format, arguments: {pattern: x}}]",
        f"run={{name: recorded, root: {tmp_path}, steps: 1}}",
        "rollout={prompts_per_step: 2}",
        "observe={tensorboard: false, samples_per_step: 2}",
    ]
    return load_config(PPOConfig, None, settings)


def record(config: PPOConfig, step: ScoredRollouts) -> list[dict[str, object]]:
    view = LiveView("test", live=False)
    with Recorder(config, dump_config(config), lambda *_: [], view) as recorder:
        recorder.resume(0)
        recorder.on_step_end(1, {"objective/scores": 1.0}, step)
    return read_samples(config.run.folder / "samples")


def test_shown_responses_carry_their_tokens_and_each_tokens_kl(config: PPOConfig):
    first, second = record(config, scored(policy=[-1.0, -2.0, -3.0], reference=[-1.5, -2.0, -2.0]))
    assert first["token_kl"] == pytest.approx([0.5, 0.0, -1.0])
    assert first["kl"] == pytest.approx(-0.5)
    assert len(first["tokens"]) == 3  # type: ignore[arg-type]
    assert (first["score"], second["score"]) == (0.5, 1.5)
    run = read_run(config.run.folder)
    assert (run.kind, run.rollouts.total, run.environment["packages"]["ray"][:2]) == ("PPO", 2, "2.")


def test_without_a_reference_there_are_no_tokens_and_no_kl(config: PPOConfig):
    first, _ = record(config, scored(policy=[-1.0, -2.0, -3.0]))
    assert first["kl"] is None
    assert "token_kl" not in first
