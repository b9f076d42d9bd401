"""Runs on a mixture of experts that train with the experts of their rollouts, or of their old log-probs."""

import pytest

from rayrlhf.observe.metric_names import FIRST_RATIO, LOGPROB_GAP, ROUTING_DIFFERENCE
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.train_ppo import train_ppo
from tests.models.families import write_family
from tests.ppo.runs import run_config

pytestmark = pytest.mark.usefixtures("cluster")


def steps_of(folder, path, *settings):
    folder.mkdir()
    own = [f"model.path={path}", "model.dtype=bfloat16", "critic.kind=shared", "evaluation.enabled=false", "run.steps=2"]
    config = run_config(folder, *own, *settings)
    train_ppo(config)
    return [row for row in read_metrics(config.run.folder) if LOGPROB_GAP in row]


@pytest.mark.slow
def test_the_gap_with_the_experts_of_the_rollouts_is_not_larger_than_without(tmp_path):
    path = write_family("qwen3_moe", tmp_path / "model", moe_intermediate_size=64)
    off = steps_of(tmp_path / "off", path)
    on = steps_of(tmp_path / "on", path, "rollout.routing_replay=rollout")
    assert len(on) == len(off) == 2
    assert on[0][LOGPROB_GAP] <= off[0][LOGPROB_GAP]  # of the same rollouts
    assert all(0 <= row[ROUTING_DIFFERENCE] < 0.2 for row in on)
    assert not any(ROUTING_DIFFERENCE in row for row in off)


@pytest.mark.slow
def test_all_updates_of_a_step_have_the_experts_of_its_old_log_probs(tmp_path):
    path = write_family("qwen3_moe", tmp_path / "model", moe_intermediate_size=64)
    game = ["environment={name: guessing, max_turns: 3, max_turn_tokens: 2}", "reward.functions=[{name: environment}]"]
    settings = ["rollout.routing_replay=old", "rollout.max_new_tokens=12", "train.learning_rate=1e-2"]
    rows = steps_of(tmp_path / "old", path, *settings, *game)  # whose turns bring no experts of an engine
    assert len(rows) == 2
    assert all(row[FIRST_RATIO] == 1.0 for row in rows)
    assert all(0 < row[ROUTING_DIFFERENCE] < 1 for row in rows)  # of the second mini-batch, whose router has moved
