"""Rewards from real HTTP servers on this machine that misbehave in every way we could think of."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from rayrlhf.config.reward import RewardFunctionSection, RewardSection
from rayrlhf.errors import UserError
from rayrlhf.rewards import remote as module
from rayrlhf.rewards import transport
from rayrlhf.rewards.functions import BoundFunction, ScoringBatch, load_functions
from rayrlhf.rewards.score import score_batch
from tests.rewards.servers import Answer, Server

PROMPTS = [f"p{n}" for n in range(10)]
RESPONSES = ["x" * n for n in range(10)]
FAST: dict[str, Any] = {"batch_size": 4, "backoff_seconds": 0.01, "request_seconds": 0.5, "attempts": 3}


def right(_: int, question: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"rewards": [len(response) for response in question["responses"]]}).encode()


def always(status: int, body: bytes) -> Answer:
    return lambda _, __: (status, body)


def slow(number: int, question: Any) -> tuple[int, bytes]:
    time.sleep(1.0)
    return right(number, question)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Server]]:
    monkeypatch.setattr(transport, "breakers_of", {})
    servers: list[Server] = []

    def begin(answer: Answer) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()


def ask(*urls: str, **changes: Any) -> list[float | None]:
    return asyncio.run(module.remote(PROMPTS, RESPONSES, list(urls), **{**FAST, **changes}))


LENGTHS = [float(n) for n in range(10)]

BAD: dict[str, Answer] = {
    "slow": slow,
    "garbage": always(200, b"<html>\xff"),
    "another shape": always(200, b"[1, 2, 3, 4]"),
    "wrong lengths": always(200, b'{"rewards": [1]}'),
    "not a number": lambda _, r: (200, json.dumps({"rewards": [float("nan")] * len(r["responses"])}).encode()),
    "infinite": lambda _, r: (200, json.dumps({"rewards": [1e999] * len(r["responses"])}).encode()),
    "beyond a double": lambda _, r: (200, json.dumps({"rewards": [10**400] * len(r["responses"])}).encode()),
    "text": lambda _, r: (200, json.dumps({"rewards": ["3"] * len(r["responses"])}).encode()),
    "truth": lambda _, r: (200, json.dumps({"rewards": [True] * len(r["responses"])}).encode()),
    "huge": lambda number, r: (200, right(number, r)[1] + b" " * 5_000_000),
    "dies": always(0, b""),
    "overloaded": always(503, b""),
}


def test_rewards_come_back_in_order_and_two_servers_share_the_work(start):
    both_asked = threading.Barrier(2, timeout=20)

    def together(number: int, question: Any) -> tuple[int, bytes]:
        if number == 0:
            both_asked.wait()  # a server that answers while the other is idle could take all the work on a busy machine
        return right(number, question)

    one, two = start(together), start(together)
    assert ask(one.url, two.url, batch_size=2, concurrency=2, request_seconds=30) == LENGTHS
    assert len(one.asked) + len(two.asked) == 5


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_server_gives_no_reward_after_bounded_attempts_and_the_run_stops(start, kind):
    server = start(BAD[kind])
    with pytest.raises(UserError, match=r"reward function 'remote': no valid response in 3 attempts; last: .+"):
        ask(server.url, batch_size=10)
    assert len(server.asked) == 3


@pytest.mark.parametrize("kind", BAD)
def test_a_server_that_is_bad_once_costs_one_more_attempt_and_no_reward(start, kind):
    server = start(lambda number, question: BAD[kind](number, question) if number == 0 else right(number, question))
    assert ask(server.url, batch_size=10) == LENGTHS
    assert len(server.asked) == 2


def test_a_dead_server_is_left_alone_and_the_other_does_its_work(start):
    dead, alive = start(always(0, b"")), start(right)
    for _ in range(3):
        assert ask(dead.url, alive.url, batch_size=1, concurrency=1, attempts=4) == LENGTHS
    assert len(dead.asked) == 3
    assert len(alive.asked) == 30


def test_under_skip_the_step_goes_on_with_the_other_rewards_and_without_them_it_stops(start):
    url = start(lambda number, question: right(number, question) if number == 0 else (500, b"")).url
    section = RewardSection(
        functions=[RewardFunctionSection(name="remote", arguments={"urls": [url], "on_failure": "skip", **FAST})]
    )
    (function,) = load_functions(section)
    other = BoundFunction("other", lambda responses: [1.0] * len(responses))
    batch = ScoringBatch(PROMPTS, RESPONSES)
    scored = score_batch([function, other], batch)
    assert np.isnan(scored.parts["remote"]).all()
    np.testing.assert_array_equal(scored.scores, 1.0)
    with pytest.raises(UserError, match="no reward applies to sample 0"):
        score_batch([function], batch)


def test_a_refusal_is_not_repeated_and_the_token_is_sent_and_never_shown(start, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_TOKEN", "secret-word")
    caplog.set_level("DEBUG")
    server = start(always(401, b""))
    with pytest.raises(UserError, match="responded with status 401, expected 200") as raised:
        ask(server.url, token_variable="JUDGE_TOKEN", batch_size=10)
    assert server.tokens == ["Bearer secret-word"]
    assert "secret-word" not in str(raised.value) + caplog.text
    with pytest.raises(UserError, match=r"environment variable OTHER_TOKEN \(token_variable\) is not set"):
        ask(server.url, token_variable="OTHER_TOKEN")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"urls": []}, "urls: expected http"),
        ({"urls": ["ftp://a"]}, "got .*ftp"),
        ({"on_failure": "drop"}, "'stop' or 'skip'"),
        ({"attempts": 0}, "attempts 0: expected at least 1"),
    ],
)
def test_wrong_arguments_are_one_clear_line(changes, message):
    with pytest.raises(UserError, match=message):
        asyncio.run(module.remote(PROMPTS, RESPONSES, **{"urls": ["http://a"], **changes}))
