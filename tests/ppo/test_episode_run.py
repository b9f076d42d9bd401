"""A whole run with an environment: real actors, replicas and engines, and the same numbers again."""

import json
import logging
import re

import pytest

from rayrlhf.errors import AlarmError
from rayrlhf.ppo.train_ppo import train_ppo
from tests.ppo.runs import run_config

GAME = [
    "model.dtype=float32",
    "rollout.backend=transformers",
    "reward.functions=[{name: environment}]",
    "environment={name: guessing, max_turns: 3, max_turn_tokens: 2}",
    "rollout.max_new_tokens=12",
    "rollout.replicas=2",
    "run.determinism=exact",
    "algorithm.kl.coefficient=0.01",
    "evaluation.enabled=false",
    "observe.tensorboard=false",
]

pytestmark = pytest.mark.usefixtures("cluster")


def spoken(responses):
    print(f"scored {len(responses)} responses")
    logging.getLogger(__name__).info("and logged it")
    return [0.0] * len(responses)


LOUD = "reward.functions=[{name: environment}, {name: 'tests.ppo.test_episode_run:spoken', weight: 0}]"


def played(folder, *overrides):
    folder.mkdir(exist_ok=True)
    config = run_config(folder, *GAME, *overrides)
    train_ppo(config)
    rows = (config.run.folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, rows) if "environment/turns" in row]


@pytest.mark.slow
def test_a_run_over_turns_trains_on_what_was_sampled_and_repeats_bit_for_bit(tmp_path, capsys):
    first, second = (played(tmp_path / name, *more) for name, more in (("one", [LOUD]), ("two", [])))
    log = tmp_path / "one/runs/ppo/user_output.log"
    assert f"output of your code: {log} (observe.user_output=true shows it here)" in capsys.readouterr().out
    lines = [line.partition(" ")[2] for line in log.read_text().splitlines()]
    assert lines == ["ppo/reward/0: scored 16 responses", f"ppo/reward/0: INFO {__name__}: and logged it"] * 2
    assert not (tmp_path / "two/runs/ppo/user_output.log").exists()
    assert len(first) == 2
    for one, other in zip(first, second, strict=True):
        assert 1 < one["environment/turns"] <= 3
        assert one["environment/tokens"] > 0
        assert one["environment/failed"] == 0
        # Trainer and sampler agree on every sampled token, in whichever turn it stands.
        assert one["sampling/sampling_logp_difference/mean"] < 1e-4
        assert one["policy/weights_checksum"] == other["policy/weights_checksum"]
        assert one["objective/scores"] == other["objective/scores"]
    assert first[0]["policy/weights_checksum"] != first[1]["policy/weights_checksum"]


AGENTS = [
    "rollout.max_new_tokens=120",
    "rollout.max_model_length=256",
    "model.path=builtin:tiny?layers=1&hidden=64&context=256",
]


@pytest.mark.slow
def test_a_replica_that_dies_with_agents_in_flight_loses_no_sample_and_changes_none(tmp_path):
    runs = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "whole":
            (folder / "killed").touch()
        agent = f"name: 'tests.environments.agents:killing', arguments: {{folder: '{folder}'}}"
        runs.append(played(folder, *AGENTS, f"environment={{{agent}, max_turn_tokens: 4, retries: 0}}"))
        assert (folder / "killed").exists()
    for whole, killed in zip(*runs, strict=True):
        assert whole["environment/failed"] == killed["environment/failed"] == 0
        assert killed["environment/turns"] == 2
        assert killed["policy/weights_checksum"] == whole["policy/weights_checksum"]
    journals = [list((tmp_path / name).rglob("recovery.jsonl")) for name in ("whole", "killed")]
    assert [bool(found and found[0].read_text()) for found in journals] == [False, True]


@pytest.mark.nightly
def test_a_run_over_agents_trains_on_every_segment_as_it_was_sampled_and_repeats_bit_for_bit(tmp_path):
    agents = [
        "environment={name: 'tests.environments.agents:forgetful', max_turn_tokens: 2}",
        *AGENTS,
    ]
    first, second = (played(tmp_path / name, *agents) for name in ("one", "two"))
    assert len(first) == 2
    for one, other in zip(first, second, strict=True):
        assert one["environment/segments"] == 2  # Two answers in one conversation, and one in another.
        assert one["environment/turns"] == 1.5
        assert one["environment/failed"] == 0
        assert one["objective/scores"] == pytest.approx(0.5)
        assert one["sampling/sampling_logp_difference/mean"] < 1e-4
        assert one["policy/weights_checksum"] == other["policy/weights_checksum"]
    assert first[0]["policy/weights_checksum"] != first[1]["policy/weights_checksum"]


@pytest.mark.slow
def test_a_run_whose_environment_is_broken_stops_and_says_why(tmp_path, capsys):
    broken = "environment={name: 'tests.environments.sample_players:Raising', max_turn_tokens: 2, retries: 0}"
    with pytest.raises(AlarmError, match=r"samples failed in their environment.*the tool is broken"):
        played(tmp_path, broken, "observe.user_output=true")
    assert re.search(r"ppo/rollout/\d: the tool breaks", capsys.readouterr().out)
