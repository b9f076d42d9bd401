"""Whole runs whose reward comes from elsewhere: servers that fail on the way, and programs in the sandbox."""

import json
import threading

import numpy as np
import pytest

from rayrlhf.errors import UserError
from rayrlhf.observe.samples import read_samples
from rayrlhf.ppo.train_ppo import train_ppo
from rayrlhf.rewards.sandbox import missing
from tests.ppo.runs import digit_share, run_config
from tests.rewards.servers import Server

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("cluster")]

SMALL = [
    "model.dtype=float32",
    "model.path=builtin:tiny?layers=1&hidden=64&context=64",
    "rollout.backend=transformers",
    "critic.kind=shared",
    "rollout.prompts_per_step=8",
    "evaluation.enabled=false",
    "observe.tensorboard=false",
]
PATIENCE = "batch_size: 2, attempts: 4, backoff_seconds: 0.01, request_seconds: 5"


def say_the_number(prompts, number):
    """Give `code` right programs for even rows and wrong ones for odd ones; a wrong verdict ends the run."""
    from rayrlhf.rewards.programs import code

    programs = [f"print({value + value % 2})" for value in number]
    rewards = code(programs, expected_output=[str(value) for value in number], where="whole")
    assert rewards == [float(value % 2 == 0) for value in number]
    return [0.5] * len(prompts)


class FailingServer:
    """Answers rightly for a while, then returns garbage, then an overload, and then is dead."""

    def __init__(self, right_answers: int) -> None:
        self._right = right_answers
        self.bad = 0
        self._lock = threading.Lock()
        self.server = Server(self._answer)

    def _answer(self, number, question):
        if number < self._right:
            return right(number, question)
        with self._lock:
            self.bad += 1
        wrong = json.dumps({"rewards": [100.0] * (len(question["responses"]) - 1)}).encode()
        return [(200, wrong), (200, b"<html>"), (503, b"")][self.bad - 1] if self.bad <= 3 else (0, b"")


def right(_, question):
    return 200, json.dumps({"rewards": digit_share(question["responses"])}).encode()


def remote(*urls, more=""):
    return f"reward.functions=[{{name: remote, arguments: {{urls: {json.dumps(urls)}, {PATIENCE}{more}}}}}"


def scored(config):
    rows = list(read_samples(config.run.folder / "samples"))
    assert rows
    return rows, np.array([row["score"] for row in rows]), np.array(digit_share([row["response"] for row in rows]))


def test_a_run_goes_on_with_right_rewards_alone_while_one_of_two_servers_fails_and_dies(tmp_path):
    """Beside it the reward process runs programs in the sandbox, where programs can be contained."""
    programs = "" if missing() else ", {name: 'tests.ppo.test_reward_service_run:say_the_number', weight: 0.0}"
    failing, steady = FailingServer(right_answers=1), Server(right)
    functions = remote(failing.server.url, steady.url) + programs + "]"
    config = run_config(tmp_path, *SMALL, functions, "run.steps=3", "reward.memory_gib=1")
    train_ppo(config)
    failing.server.stop()
    steady.stop()
    assert failing.bad >= 3
    rows, scores, expected = scored(config)
    assert {row["step"] for row in rows} == {1, 2, 3}
    assert not programs or {row["reward/say_the_number"] for row in rows} == {0.5}
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_when_all_servers_die_a_run_stops_or_goes_on_with_its_other_rewards_as_configured(tmp_path):
    dying = FailingServer(right_answers=4)
    with pytest.raises(UserError, match=r"reward function 'remote': no valid response in 4 attempts; last: .+"):
        train_ppo(run_config(tmp_path, *SMALL, remote(dying.server.url) + "]"))
    other = ", {name: 'tests.ppo.runs:digit_share_by_token', per: token, weight: 2.0}]"
    config = run_config(
        tmp_path, *SMALL, remote(dying.server.url, more=", on_failure: skip") + other, "run.name=skip", "run.steps=1"
    )
    train_ppo(config)
    dying.server.stop()
    rows, scores, expected = scored(config)
    # The other reward is paid token by token, and the score still counts its sum.
    assert all(row["reward/remote"] is None or np.isnan(row["reward/remote"]) for row in rows)
    np.testing.assert_allclose(scores, 2 * expected, atol=1e-6)
