"""Runs whose ranks share rows, weights or experts take the steps of a run on one process."""

import numpy as np
import pytest
from safetensors.torch import load_file

from rayrlhf.observe.metric_names import ROUTER_LOSS
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.train_ppo import train_ppo
from tests.models.families import write_family
from tests.ppo.runs import run_config

COMPARED = (
    "policy/grad_norm", "critic/grad_norm", "objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg",
    "policy/entropy_avg", "val/ratio", ROUTER_LOSS, "moe/load_balance/layer_1", "moe/max_violation/layer_0",
)  # fmt: skip

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]


def trained(folder, name, *overrides, ends=(2,)):
    """The metrics of each step and the exported weights of a run of two steps, resumed after each of `ends`."""
    for end in ends:
        config = run_config(
            folder, f"run.name={name}", f"run.steps={end}", "run.determinism=exact", "rollout.backend=transformers",
            "train.optimizer.name=sgd", "train.learning_rate=0.05", "model.dtype=float32", "evaluation.enabled=false",
            *overrides,
        )  # fmt: skip
        train_ppo(config)
    rows = [row for row in read_metrics(config.run.folder) if "lr" in row]
    return rows, load_file(config.run.folder / "export" / "model.safetensors")


def same(expected, found):
    """Equal metrics and exported weights."""
    (rows, weights), (others, exported) = expected, found
    assert len(rows) == len(others) == 2
    for one, other in zip(rows, others, strict=True):
        names = [name for name in COMPARED if name in one]
        assert {"policy/grad_norm", "objective/scores", "loss/value_avg"} <= set(names)
        np.testing.assert_allclose([other[name] for name in names], [one[name] for name in names], rtol=1e-4, atol=1e-5)
    assert rows[0]["policy/grad_norm"] > 0
    assert set(exported) == set(weights)
    for name, weight in weights.items():
        np.testing.assert_allclose(exported[name], weight, rtol=0, atol=1e-6, err_msg=name)


DENSE = "model.path=builtin:tiny?layers=2&hidden=256&context=64"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("alone"), "alone", DENSE)


# The run on shared weights stops after its first step and resumes.
@pytest.mark.parametrize(("grid", "ends"), [("sequence_parallel", (2,)), ("tensor_parallel", (1, 2))])
def test_policy_and_critic_whose_ranks_share_rows_or_weights(alone, tmp_path, grid, ends):
    placement = [f"placement.{role}={{ranks: 2, {grid}: 2}}" for role in ("policy", "critic")]
    same(alone, trained(tmp_path, grid, DENSE, *placement, ends=ends))


def test_a_policy_whose_ranks_share_experts_and_replay_those_of_the_rollouts(tmp_path):
    settings = ["critic.kind=shared", f"model.path={write_family('qwen3_moe', tmp_path / 'model', num_hidden_layers=2)}"]
    settings += ["rollout.routing_replay=rollout", "train.router_aux_loss_coefficient=0.1", "train.micro_batch_size=1"]
    shared = ["placement.policy={ranks: 2, expert_parallel: 2}", "train.zero_stage=1"]
    alone, experts = trained(tmp_path, "alone", *settings), trained(tmp_path, "experts", *settings, *shared)
    assert set(COMPARED) <= set(experts[0][0]) | {"critic/grad_norm"}
    same(alone, experts)
