"""A run whose policy has two ranks that share experts, against one in which it has one rank."""

import numpy as np
import pytest
from safetensors.torch import load_file

from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.train_ppo import train_ppo
from tests.models.families import write_family
from tests.ppo.runs import run_config
from tests.ppo.test_tensor_parallel_training import COMPARED

SHARED = ["placement.policy={ranks: 2, expert_parallel: 2}", "train.zero_stage=1"]

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.slow
def test_a_run_on_shared_experts_takes_the_steps_of_its_twin_on_one_process(tmp_path):
    model = write_family("qwen3_moe", tmp_path / "model", num_hidden_layers=2)
    found, exported = [], []
    for name, overrides in (("alone", []), ("shared", SHARED)):
        config = run_config(
            tmp_path, f"run.name={name}", "run.steps=2", "run.determinism=exact", "rollout.backend=transformers",
            "train.optimizer.name=sgd", "train.learning_rate=0.05", "model.dtype=float32", "evaluation.enabled=false",
            "critic.kind=shared", f"model.path={model}", *overrides,
        )  # fmt: skip
        train_ppo(config)
        found.append([row for row in read_metrics(config.run.folder) if "lr" in row])
        exported.append(load_file(config.run.folder / "export" / "model.safetensors"))
    assert [len(rows) for rows in found] == [2, 2]
    for alone, shared in zip(*found, strict=True):
        names = [name for name in COMPARED if name in alone]
        assert {"policy/grad_norm", "objective/scores", "loss/value_avg"} <= set(names)
        np.testing.assert_allclose([shared[name] for name in names], [alone[name] for name in names], rtol=1e-4, atol=1e-5)
    assert found[0][0]["policy/grad_norm"] > 0
    assert set(exported[0]) == set(exported[1])
    for name, weight in exported[0].items():
        np.testing.assert_allclose(exported[1][name], weight, rtol=0, atol=1e-6, err_msg=name)
