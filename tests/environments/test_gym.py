"""Environments with Gymnasium's interface: seeds, options, rewards and ends arrive."""

import asyncio
import threading
import time

import numpy as np
import pytest

from rayrlhf.config.rollout import EnvironmentSection
from rayrlhf.data.records import Prompt, RolloutRequest, SampleKey
from rayrlhf.environments.players.episode_player import EpisodePlayer
from rayrlhf.environments.protocol import Action, Answer
from rayrlhf.environments.registry import environment_maker
from rayrlhf.errors import UserError
from rayrlhf.models.tiny import byte_tokenizer
from tests.environments.sample_players import Scripted


class Countdown:
    """Says what it heard, and is over after `turns`; with `old` in the form of Gym before 0.26."""

    def __init__(self, turns=2, old=False):
        self.left, self.old, self.closed = turns, old, False

    def reset(self, *, seed, options):
        self.seen = f"{options['prompt']} {options['answer']} {seed}"
        return self.seen, {}

    def step(self, action):
        self.left -= 1
        if self.old:
            return action, 0.0, True, {}
        return np.array([1, 2]) if self.left else "over", np.float32(0.5), False, self.left == 0, {}

    def close(self):
        self.closed = True


PROMPT = Prompt(0, "ask", np.zeros(1, np.int32), {"answer": "ab"})
ACTION = Action("hit", np.zeros(1, np.int32))
TOKENIZER = byte_tokenizer()


def made(**arguments):
    arguments = {"make": "tests.environments.test_gym:Countdown", "arguments": arguments}
    return environment_maker(EnvironmentSection(name="gym", arguments=arguments))()


def test_an_environment_of_gymnasium_is_played_as_text():
    game = made(turns=2)

    async def play():
        return [await game.reset(PROMPT, 2**31 + 7), await game.step(ACTION), await game.step(ACTION)]

    assert asyncio.run(play()) == ["ask ab 7", Answer("[1 2]", 0.5, False), Answer("over", 0.5, True)]


class Watched(Countdown):
    """Notes its instances; a second turn fails or waits for `go`."""

    made, go = [], threading.Event()

    def __init__(self, slow=False):
        super().__init__(turns=3)
        self.slow, self.closes = slow, 0
        self.made.append(self)

    def step(self, action):
        if self.left == 2:
            assert self.slow, "it breaks"
            self.go.wait(20)
        return super().step(action)

    def close(self):
        self.closes += 1


@pytest.mark.parametrize(
    ("slow", "keys", "closes"),
    [
        (False, {"max_turns": 1}, [1]),  # cut off
        (False, {}, [1, 1]),  # fails twice
        (True, {"timeout_seconds": 0.3, "retries": 0}, [0]),  # a call that still runs closes it
        (True, {}, [0]),  # cancelled
    ],
)
def test_an_environment_is_closed_however_its_sample_ends(slow, keys, closes):
    Watched.made.clear()
    Watched.go.clear()
    arguments = {"make": "tests.environments.test_gym:Watched", "arguments": {"slow": slow}}
    section = EnvironmentSection.model_validate({"name": "gym", "arguments": arguments} | keys)
    player = EpisodePlayer(Scripted([[*b"ab"]] * 4, TOKENIZER), section, TOKENIZER)
    player.submit([RolloutRequest(SampleKey(0, 0, 0), PROMPT.token_ids, 1, PROMPT)], temperature=1.0, max_new_tokens=90)
    player.poll(1, 1.0)
    player.cancel()
    player.close()
    assert [game.closes for game in Watched.made] == closes
    Watched.go.set()
    deadline = time.monotonic() + 10
    while any(game.closes != 1 for game in Watched.made) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [game.closes for game in Watched.made] == [1] * len(closes)


def test_another_interface_and_another_maker_are_named():
    game = made(old=True)

    async def play():
        await game.reset(PROMPT, 1)
        await game.step(ACTION)

    with pytest.raises(TypeError, match=r"step returned \('hit'.*expected \(observation, reward, terminated"):
        asyncio.run(play())
    with pytest.raises(UserError, match="takes no argument 'turn'; did you mean 'turns'"):
        made(turn=1)
