"""A judge behind a real HTTP server on this machine."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from rayrlhf.config.reward import RewardFunctionSection, RewardSection
from rayrlhf.errors import UserError
from rayrlhf.rewards import transport
from rayrlhf.rewards.functions import BoundFunction, ScoringBatch, load_functions
from rayrlhf.rewards.judge import judge
from rayrlhf.rewards.score import score_batch
from tests.rewards.servers import Answer, Server

FAST: dict[str, Any] = {"model": "m", "backoff_seconds": 0.01, "request_seconds": 5.0, "attempts": 3}
TEMPLATE = "Q {prompt} A {response}"


def says(text: object) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def length(_: int, question: Any) -> tuple[int, bytes]:
    """The mark is the number of letters of the response."""
    response = question["messages"][0]["content"].rpartition(" A ")[2]
    return says(f"Score: 9, no:\nScore: {len(response)}")


@pytest.fixture
def start(monkeypatch):
    monkeypatch.setattr(transport, "breakers_of", {})
    servers: list[Server] = []

    def begin(answer: Answer) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()


def ask(*urls: str, prompts=("p",) * 3, responses=("a", "bb", "ccc"), **changes: Any) -> list[float | None]:
    return asyncio.run(judge(list(prompts), list(responses), list(urls), **{**FAST, "template": TEMPLATE, **changes}))


def test_marks_come_back_in_order_scaled_from_low_to_high(start):
    server = start(length)
    assert ask(f"{server.url}/v1/", low=1, high=5) == [0.0, 0.25, 0.5]
    assert set(server.paths) == {"/v1/chat/completions"}
    assert {(question["model"], question["temperature"], question["max_tokens"]) for question in server.asked} == {
        ("m", 0, 512)
    }


def test_what_looks_like_a_place_in_a_text_stays_and_the_reference_is_put_in(start):
    server = start(lambda *_: says("Score: 5"))
    ask(
        server.url, prompts=["{response}"], responses=["{answer} {prompt}"], answer=[7], template="{prompt}|{response}|{answer}"
    )
    assert server.asked[0]["messages"] == [{"role": "user", "content": "{response}|{answer} {prompt}|7"}]


@pytest.mark.parametrize("text", ["Splendid!", "", "Score: eleven", "Score: 11", "Score: -1", "score 5"])
def test_an_answer_without_a_mark_is_asked_for_again_and_then_there_is_no_reward(start, text):
    never = start(lambda *_: says(text))
    assert ask(never.url, responses=["a"], prompts=["p"]) == [None]
    assert len(never.asked) == 2
    once = start(lambda number, question: says(text) if number == 0 else length(number, question))
    assert ask(once.url, responses=["a"], prompts=["p"]) == [0.1]


@pytest.mark.parametrize(
    "bad", [(200, b"{}"), (200, b"Score: 3"), (200, b'{"choices": []}'), says(None), says(3), (503, b""), (0, b"")]
)
def test_a_bad_server_gives_no_reward_and_stops_the_run_or_leaves_the_batch_to_the_other_rewards(start, bad):
    server = start(lambda *_: bad)
    with pytest.raises(UserError, match="reward function 'judge': no valid response in 3 attempts"):
        ask(server.url, responses=["a"], prompts=["p"])
    assert len(server.asked) == 3
    half = start(lambda number, question: bad if number else length(number, question))
    assert ask(half.url, on_failure="skip", concurrency=1) == [None] * 3


def test_in_a_sum_a_sample_without_a_mark_is_nan_there_and_alone_it_stops_the_run(start):
    url = start(lambda _, question: says("?") if question["messages"][0]["content"].endswith("bb") else says("Score: 10")).url
    arguments = {"urls": [url], **FAST, "template": TEMPLATE}
    (function,) = load_functions(RewardSection(functions=[RewardFunctionSection(name="judge", arguments=arguments)]))
    batch = ScoringBatch(["p"] * 2, ["a", "bb"])
    other = BoundFunction("other", lambda responses: [0.5] * len(responses))
    np.testing.assert_array_equal(score_batch([function, other], batch).parts["judge"], [1.0, np.nan])
    with pytest.raises(UserError, match="no reward applies to sample 1: all of judge returned None"):
        score_batch([function], batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "{prompt}"}, r"template has no \{response\}"),
        ({"template": "{response} {answer}"}, r"template has \{answer\}, but the dataset has no column 'answer'"),
        ({"verdict": "("}, "verdict .*: missing"),
        ({"verdict": "[0-9]"}, "expected one group in parentheses, the grade, found 0"),
        ({"low": 3, "high": 3}, "expected low < high"),
        ({"verdict_attempts": 0}, "verdict_attempts 0: expected at least 1"),
        ({"on_failure": "drop"}, "'stop' or 'skip'"),
    ],
)
def test_wrong_arguments_are_one_clear_line(changes, message):
    with pytest.raises(UserError, match=message):
        ask("http://127.0.0.1:9", **changes)
