"""`rayrlhf debug` after a real run whose reward never came back."""

import json
import tarfile

import pytest

from rayrlhf.errors import ActorLostError, DeadlineError
from rayrlhf.observe.vitals import FILE_NAME
from rayrlhf.ppo.train_ppo import train_ppo
from rayrlhf.tools.debug.debug_command import write_debug
from rayrlhf.tools.report.run_files import read_lines
from tests.ppo.runs import run_config


@pytest.mark.slow
def test_a_run_whose_reward_hangs_leaves_the_stacks_of_all_processes_and_their_state(tmp_path, monkeypatch):
    monkeypatch.setattr("rayrlhf.observe.vitals.SECONDS", 1.0)
    harm = json.dumps({"folder": str(tmp_path / "calls"), "harm": "slow", "at_call": 3})
    config = run_config(
        tmp_path,
        f"reward.functions=[{{name: tests.chaos.harm:hindered, arguments: {harm}}}]",
        "rollout.backend=transformers",
        "critic.kind=shared",
        "reward.probe=false",
        "deadlines.score=6",
        "recovery.enabled=false",
        "recovery.ping_every=1",
        "evaluation.enabled=false",
        "run.steps=9",
    )
    with pytest.raises((DeadlineError, ActorLostError), match="ppo/reward/0"):
        train_ppo(config)
    folder = config.run.folder
    kept = {path.name.partition("-")[2].partition("-")[2]: path.read_text() for path in (folder / "stacks").iterdir()}
    assert {"driver.txt", "ppo-policy-0.txt", "ppo-reward-0.txt", "ppo-rollout-0.txt"} <= set(kept)
    assert "harm.py" in kept["ppo-reward-0.txt"]
    assert "_sleep" in kept["ppo-reward-0.txt"]
    lines = [
        line for line in read_lines(folder / FILE_NAME) if line["actors"]["ppo/reward/0"]["call"].startswith("reward called ")
    ]
    assert lines
    assert lines[-1]["actors"]["ppo/reward/0"]["pid"] > 0
    assert lines[-1]["waits"]["reward"] > 2
    _, archive = write_debug(folder)
    with tarfile.open(archive) as file:
        names = {entry.name.partition("/")[2] for entry in file}
    assert {"config.yaml", "vitals.jsonl", "metrics.jsonl", "debug.html"} <= names
    assert any(name.startswith("stacks/") and "ppo-reward-0" in name for name in names)
    assert any(name.startswith("logs/ppo-") for name in names)
