"""Which settings a resumed PPO run may change."""

import pytest
import yaml

from rayrlhf.config.loading.load import dump_config
from rayrlhf.ppo.run_identity import stored_differences
from tests.ppo.runs import run_config

FREE = ["run.steps=9", "evaluation.every=3", "checkpoint.every=2", "observe.live=true", "run.resume=never"]


def changed(folder, *overrides, base=()):
    return stored_differences(dump_config(run_config(folder, *base)), dump_config(run_config(folder, *base, *overrides)))


@pytest.mark.parametrize(
    "setting", [*FREE, "placement.policy.ranks=2", "rollout.replicas=3", "recovery.attempts=5", "train.share_prefixes=off"]
)
def test_length_outputs_and_processes_may_change(tmp_path, setting):
    assert changed(tmp_path, setting) == []


@pytest.mark.parametrize("setting", ["train.learning_rate=0.5", "evaluation.prompts=4", "run.seed=3"])
def test_settings_that_make_another_run_may_not(tmp_path, setting):
    assert [line.partition(":")[0] for line in changed(tmp_path, setting)] == [setting.partition("=")[0]]


def test_an_exact_run_may_become_longer_but_keeps_its_processes(tmp_path):
    exact = ["run.determinism=exact"]
    assert changed(tmp_path, *FREE, base=exact) == []
    assert changed(tmp_path, "train.share_prefixes=off", base=exact) == ['train.share_prefixes: "auto" -> "off"']
    assert changed(tmp_path, "rollout.replicas=2", base=exact) == ["rollout.replicas: 1 -> 2"]


def test_a_folder_without_a_newer_key_has_the_behavior_of_the_code_that_wrote_it(tmp_path):
    config = run_config(tmp_path, "environment.name=calculator")
    tree = yaml.safe_load(dump_config(config))
    assert tree["environment"].pop("votes") == "sample"
    assert stored_differences(yaml.safe_dump(tree), dump_config(config)) == ['environment.votes: "segment" -> "sample"']


def test_an_exact_run_of_a_version_that_shared_no_prefixes_goes_on_without(tmp_path):
    config = run_config(tmp_path, "run.determinism=exact")
    tree = yaml.safe_load(dump_config(config))
    assert tree["train"].pop("share_prefixes") == "auto"
    assert stored_differences(yaml.safe_dump(tree), dump_config(config)) == ['train.share_prefixes: "off" -> "auto"']
