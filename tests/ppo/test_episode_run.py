"""A whole run with an environment: real actors, replicas and engines, and the same numbers again."""

import json

import pytest
import ray

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


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def played(folder, *overrides):
    folder.mkdir(exist_ok=True)
    config = run_config(folder, *GAME, *overrides)
    train_ppo(config)
    rows = (config.run.folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, rows) if "environment/turns" in row]


def test_a_run_over_turns_trains_on_what_was_sampled_and_repeats_bit_for_bit(tmp_path):
    first, second = (played(tmp_path / name) for name in ("one", "two"))
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


@pytest.mark.nightly
def test_a_run_over_agents_trains_on_every_segment_as_it_was_sampled_and_repeats_bit_for_bit(tmp_path):
    agents = [
        "environment={name: 'tests.environments.agents:forgetful', max_turn_tokens: 2}",
        "rollout.max_new_tokens=120",
        "rollout.max_model_length=256",
        "model.path=builtin:tiny?layers=1&hidden=64&context=256",
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


def test_a_run_whose_environment_is_broken_stops_and_says_why(tmp_path):
    broken = "environment={name: 'tests.environments.sample_players:Raising', max_turn_tokens: 2, retries: 0}"
    with pytest.raises(AlarmError, match=r"samples failed in their environment.*the tool is broken"):
        played(tmp_path, broken)
