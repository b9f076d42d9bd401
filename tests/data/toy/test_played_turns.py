"""Transcripts of careless players are what the built-in environments would have said, turn for turn."""

import asyncio
import re
from collections import Counter

import numpy as np
import pytest

from rayrlhf.data.records import Prompt
from rayrlhf.data.toy.builtin_rows import read_builtin
from rayrlhf.data.toy.played_turns import calculations, guesses
from rayrlhf.environments.calculator import Calculator
from rayrlhf.environments.guessing import Guessing
from rayrlhf.environments.protocol import Action

TOKEN = np.zeros(1, np.int32)


async def played(environment, row, turns):
    """The transcript that an environment makes of these turns, and whether the sample was over just then."""
    await environment.reset(Prompt(0, row["prompt"], TOKEN, row), 0)
    said = ""
    for turn in turns:
        answer = await environment.step(Action(turn, TOKEN))
        said += turn + ("" if answer.done else answer.observation)
    return said, answer


@pytest.mark.parametrize("digits", [2, 3, 5])
def test_a_calculation_is_what_the_calculator_says_to_the_same_turns(digits):
    rows = calculations(0, 300, "train", calls=40, digits=digits)
    asking = [row for row in rows if row["completion"].startswith("[")]
    assert 80 < len(asking) < 160
    for row in rows:
        left, right = row["prompt"].removesuffix("=").split("+")
        assert len(left) == len(right) == digits
        turns = [f"[{left}+{right}]", row["answer"]] if row in asking else [row["completion"]]
        said, answer = asyncio.run(played(Calculator(), row, turns))
        assert said == row["completion"]
        assert (answer.reward, answer.done) == (float(row in asking or int(row["answer"]) % 10 == 0), True)
        assert row in asking or abs(int(row["completion"]) - int(left) - int(right)) <= 5


def test_a_calculation_in_a_chat_is_the_same_sum_through_a_tool_call():
    for row, plain in zip(*(calculations(0, 60, "train", calls=50, chat=chat) for chat in (1, 0)), strict=True):
        assert row["messages"][0] == {"role": "user", "content": plain["prompt"]}
        *_, said = plain["completion"].split()
        assert row["messages"][-1] == {"role": "assistant", "content": said}
        assert len(row["messages"]) == (4 if plain["completion"].startswith("[") else 2)
        if len(row["messages"]) == 4:
            (call,) = row["messages"][1]["tool_calls"]
            assert call["function"]["arguments"]["s"] + "=" == plain["prompt"]
            assert call["function"]["name"] == row["tools"][0]["function"]["name"]


def test_codes_of_both_splits_are_alike_and_as_frequent_and_none_is_in_both():
    rows = {split: [row["prompt"] for row in calculations(0, 2000, split, lookups=50)] for split in ("train", "evaluation")}
    codes = {split: {prompt for prompt in prompts if prompt.startswith("code ")} for split, prompts in rows.items()}
    assert not codes["train"] & codes["evaluation"]
    for split, prompts in rows.items():
        assert np.mean([prompt in codes[split] for prompt in prompts]) == pytest.approx(0.5, abs=0.05)
        assert {prompt[-2] for prompt in codes[split]} == set("0123456789")


def test_a_game_is_what_guessing_says_to_the_same_turns_and_its_player_does_not_listen():
    rows = guesses(0, 2000, "train")
    first, repeated = Counter(), 0
    for row in rows:
        turns = re.findall(r"\d", row["completion"])
        first[turns[0]] += 1
        repeated += len(set(turns)) < len(turns)
        said, answer = asyncio.run(played(Guessing(column="hidden"), row, turns))
        assert said == row["completion"]
        assert answer.done or len(turns) == 4
    assert min(first.values()) > 140
    assert repeated > 300
    won = np.mean([row["completion"][-1].isdigit() for row in rows])
    assert won == pytest.approx(1 - 0.9**4, abs=0.04)


def test_a_player_who_listens_wins_more_and_never_guesses_what_is_ruled_out():
    won = []
    for row in guesses(0, 500, "train", listens=100):
        low, high = 0, 9
        for turn, heard in re.findall(r"(\d)([<>]?)", row["completion"]):
            assert low <= int(turn) <= high
            low, high = (low, int(turn) - 1) if heard == "<" else (int(turn) + 1, high)
        won.append(row["completion"][-1].isdigit())
    assert np.mean(won) > 0.7


def test_a_game_as_a_conversation_is_the_same_game_and_ends_with_a_guess():
    for plain, chat in zip(guesses(0, 200, "train"), guesses(0, 200, "train", chat=1), strict=True):
        texts = [message["content"] for message in chat["messages"]]
        assert texts[0] == plain["prompt"] == chat["prompt"]
        assert "".join(texts[1:]) == plain["completion"].rstrip("<>")
        assert [message["role"] for message in chat["messages"]] == ["user", "assistant"] * (len(texts) // 2)
        assert "completion" not in chat


@pytest.mark.parametrize("name", ["calculations", "guesses"])
def test_splits_share_no_prompt_and_a_smaller_count_is_the_beginning(name):
    train, field = read_builtin(f"builtin:{name}", "train", None, 5000)
    held_out, _ = read_builtin(f"builtin:{name}?seed=3", "evaluation", None, None)
    assert not {row[field] for row in train} & {row[field] for row in held_out}
    assert read_builtin(f"builtin:{name}", "train", None, 50)[0] == train[:50]
    assert len(held_out) == 500
