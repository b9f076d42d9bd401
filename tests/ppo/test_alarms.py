"""A run that can learn nothing says so, ends with a checkpoint when it is told to, and goes on when it is asked to."""

import pytest

from rayrlhf.errors import AlarmError
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config

pytestmark = pytest.mark.usefixtures("cluster")


def always_one(responses):
    return [1.0] * len(responses)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return run_config(
        tmp_path_factory.mktemp("alarm"),
        "reward.functions=[{name: tests.ppo.test_alarms:always_one}]",
        "algorithm={kl: {coefficient: 0.0}, advantage: {estimator: grpo}}",
        "rollout={backend: transformers, prompts_per_step: 4, samples_per_prompt: 2, max_new_tokens: 4, max_model_length: 64}",
        "train.mini_batch_size=8",
        "evaluation.enabled=false",
        "observe.on_alarm=stop",
        "run.steps=5",
    )


@pytest.mark.slow
def test_an_alarm_stops_the_run_with_a_checkpoint_and_the_same_call_goes_on(config, capfd):
    with pytest.raises(AlarmError, match=r"stopped after step 3, as observe.on_alarm says.*dead reward since step 1"):
        train_ppo(config)
    assert "alarm: dead reward since step 1: all responses of a step have the same score" in " ".join(
        capfd.readouterr().out.split()
    )
    assert (config.run.folder / "checkpoints" / "step-000003").is_dir()
    rows = read_metrics(config.run.folder)
    assert [row.get("alarm/dead_reward") for row in rows] == [None, None, 1.0]
    assert train_ppo(config).steps == 5
    rows = read_metrics(config.run.folder)
    assert [row.get("alarm/dead_reward") for row in rows] == [None, None, 1.0, 1.0, 1.0]
    assert {row["sampling/staleness/max"] for row in rows} == {0.0}
    assert all(row["memory/peak_gib"] < row["memory/limit_gib"] for row in rows)
