"""The plan says which roles start, does the arithmetic, and gives the reason for what is skipped."""

import pytest

from rayrlhf.config.loading.describe import describe
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig


def plan(minimal, *overrides: str) -> list[str]:
    return describe(load_config(PPOConfig, minimal, overrides)).splitlines()


def test_the_arithmetic_of_a_step_is_right(minimal):
    lines = plan(
        minimal,
        "rollout.prompts_per_step=6",
        "rollout.samples_per_prompt=4",
        "train.mini_batch_size=8",
        "train.epochs=2",
        "run.steps=10",
    )
    assert "a step: 6 prompts x 4 responses = 24 samples of at most 256 new tokens, temperature 1" in lines
    assert "its updates: 2 epochs x 3 mini-batches of 8 samples = 6 optimizer steps; 60 in the whole run" in lines


@pytest.mark.parametrize(
    ("overrides", "expected", "absent"),
    [
        ([], ["critic: builtin:tiny, 1 process", "reference: builtin:tiny, 1 process"], "skipped: the"),
        (
            ["algorithm.kl.coefficient=0"],
            ["skipped: the reference model, because algorithm.kl.coefficient is 0"],
            "reference: ",
        ),
        (
            ["placement.policy={ranks: 4, sequence_parallel: 2}", "placement.reward.ranks=2"],
            ["policy: builtin:tiny, 4 processes, rows split over 2, ZeRO stage 0", "reward: length x 1, 2 processes"],
            "policy: builtin:tiny, 4 processes, Z",
        ),
        (
            ["placement.critic={ranks: 2, tensor_parallel: 2}"],
            ["critic: builtin:tiny, 2 processes, weights split over 2"],
            "policy: builtin:tiny, 1 process, weights",
        ),
        (["model.lora.rank=4"], ["reference: the policy without its adapters"], "reference: builtin:tiny"),
        (["critic.kind=shared"], ["critic: a head on the policy's trunk"], "critic: builtin:tiny"),
        (["rollout.replicas=2", "rollout.tensor_parallel_size=4"], ["rollout: vllm, 2 replicas of 4 devices"], "vllm, 1"),
        ([], ["skipped: evaluation, because data.evaluation is not given"], "evaluation: "),
        (["data.evaluation.path=x.jsonl"], ["evaluation: 128 prompts of x.jsonl, before and after"], "skipped: evaluation"),
    ],
)
def test_roles_and_reasons(minimal, overrides, expected, absent):
    lines = plan(minimal, *overrides)
    assert set(expected) <= set(lines)
    assert not any(line.startswith(absent) for line in lines)


def test_sampling_ahead_and_sleep_are_told_where_they_are_on(minimal):
    assert not [line for line in plan(minimal) if line.startswith("sampling:")]
    ahead = (
        "sampling: up to 2 steps ahead of training; unfinished responses continue with new weights, importance weights: token"
    )
    assert ahead in plan(minimal, "async.max_staleness=2")
    cut = "sampling: up to 1 step ahead of training; unfinished responses restart with new weights, importance weights: none"
    assert cut in plan(minimal, "async={max_staleness: 1, on_update: cut}", "algorithm.off_policy_correction.level=none")
    assert "sampling: replicas release their GPU memory while models train" in plan(minimal, "rollout.sleep=true")
