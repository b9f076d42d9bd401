"""A run whose policy and critic have two ranks each that share rows, against one in which they have one rank."""

import numpy as np
import pytest

from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config

SPLIT = [f"placement.{role}={{ranks: 2, sequence_parallel: 2}}" for role in ("policy", "critic")]
COMPARED = (
    "policy/grad_norm", "critic/grad_norm", "objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg",
    "policy/entropy_avg", "val/ratio",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.slow
def test_a_run_on_shared_rows_takes_the_steps_of_its_twin_on_one_process(tmp_path):
    found = []
    for name, overrides in (("alone", []), ("split", SPLIT)):
        config = run_config(
            tmp_path, f"run.name={name}", "run.steps=3", "run.determinism=exact", "rollout.backend=transformers",
            "train.optimizer.name=sgd", "train.learning_rate=0.05", "model.dtype=float32", "evaluation.enabled=false",
            *overrides,
        )  # fmt: skip
        train_ppo(config)
        found.append([row for row in read_metrics(config.run.folder) if "lr" in row])
    assert [len(rows) for rows in found] == [3, 3]
    for alone, split in zip(*found, strict=True):
        names = [name for name in COMPARED if name in alone]
        assert {"policy/grad_norm", "critic/grad_norm", "objective/scores"} <= set(names)
        np.testing.assert_allclose([split[name] for name in names], [alone[name] for name in names], rtol=1e-4, atol=1e-5)
    assert found[0][0]["policy/grad_norm"] > 0
