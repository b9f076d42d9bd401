"""Whole runs that compute shared prefixes once take the steps of their twins that compute each copy."""

import numpy as np
import pytest

from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config

COMPARED = (
    "policy/grad_norm", "critic/grad_norm", "objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg",
    "policy/entropy_avg", "val/ratio", "ppo/returns/mean",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("cluster")


def rows_of(tmp_path, share_prefixes, *overrides):
    config = run_config(
        tmp_path, f"run.name={share_prefixes}", "run.steps=3", "run.determinism=exact", "rollout.backend=transformers",
        "rollout.prompts_per_step=4", "rollout.samples_per_prompt=8", "train.mini_batch_size=16", "train.optimizer.name=sgd",
        "train.learning_rate=0.05", "model.dtype=float32", "evaluation.enabled=false", f"train.share_prefixes={share_prefixes}",
        *overrides,
    )  # fmt: skip
    train_ppo(config)
    return [row for row in read_metrics(config.run.folder) if "lr" in row]


@pytest.mark.slow
def test_a_run_of_groups_with_critic_and_reference_takes_the_steps_of_its_twin_without_sharing(tmp_path):
    apart, shared = (rows_of(tmp_path, name, "placement.policy.ranks=2") for name in ("off", "auto"))
    assert len(apart) == len(shared) == 3
    names = [name for name in COMPARED if name in apart[0]]
    assert {"policy/grad_norm", "critic/grad_norm", "objective/scores", "objective/kl"} <= set(names)
    for one, other in zip(apart, shared, strict=True):
        np.testing.assert_allclose([other[name] for name in names], [one[name] for name in names], rtol=1e-4, atol=1e-5)
        assert one["tokens/shared_fraction"] == 0
        assert other["tokens/shared_fraction"] > 0.2
        assert other["tokens/computed"] < 0.8 * one["tokens/computed"]
    assert shared[-1]["policy/grad_norm"] > 0
