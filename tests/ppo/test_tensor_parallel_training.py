"""A run whose policy and critic have two ranks each that share weights, against one in which they have one rank."""

import numpy as np
import pytest
from safetensors.torch import load_file

from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config

CUT = [f"placement.{role}={{ranks: 2, tensor_parallel: 2}}" for role in ("policy", "critic")]
COMPARED = (
    "policy/grad_norm", "critic/grad_norm", "objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg",
    "policy/entropy_avg", "val/ratio",
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.slow
def test_a_run_on_shared_weights_that_resumes_takes_the_steps_of_its_twin_on_one_process(tmp_path):
    found, exported = [], []
    for name, steps, overrides in (("alone", (2,), []), ("cut", (1, 2), CUT)):
        for end in steps:
            config = run_config(
                tmp_path, f"run.name={name}", f"run.steps={end}", "run.determinism=exact", "rollout.backend=transformers",
                "train.optimizer.name=sgd", "train.learning_rate=0.05", "model.dtype=float32", "evaluation.enabled=false",
                "model.path=builtin:tiny?layers=2&hidden=256&context=64", *overrides,
            )  # fmt: skip
            train_ppo(config)
        found.append([row for row in read_metrics(config.run.folder) if "lr" in row])
        exported.append(load_file(config.run.folder / "export" / "model.safetensors"))
    assert [len(rows) for rows in found] == [2, 2]
    for alone, cut in zip(*found, strict=True):
        names = [name for name in COMPARED if name in alone]
        assert {"policy/grad_norm", "critic/grad_norm", "objective/scores"} <= set(names)
        np.testing.assert_allclose([cut[name] for name in names], [alone[name] for name in names], rtol=1e-4, atol=1e-5)
    assert found[0][0]["policy/grad_norm"] > 0
    assert set(exported[0]) == set(exported[1])
    for name, weight in exported[0].items():
        np.testing.assert_allclose(exported[1][name], weight, rtol=0, atol=1e-6, err_msg=name)
