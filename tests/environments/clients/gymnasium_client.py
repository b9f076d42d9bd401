"""An environment of the package gymnasium, played as `environment: {name: gym}` plays it."""

import asyncio
import json
from types import SimpleNamespace

import gymnasium
from gymnasium.spaces import Text

from rayrlhf.environments.gym import Gym
from rayrlhf.environments.protocol import Action

CLOSED = []


class Halves(gymnasium.Env):
    """Says a number; the half of it is paid and ends the episode, as does the third turn by its time limit."""

    action_space = observation_space = Text(10)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = int(options["number"]) if options and "number" in options else 2 * int(self.np_random.integers(1, 50))
        return str(self.number), {}

    def step(self, action):
        right = action == str(self.number // 2)
        return "right" if right else "wrong", float(right), right, False, {}

    def close(self):
        CLOSED.append(self.number)


gymnasium.register("Halves-v0", Halves, max_episode_steps=3)


async def play(number, turns):
    game = Gym("gymnasium:make", {"id": "Halves-v0"})
    prompt = SimpleNamespace(columns={"number": number}, text="")
    said = [await game.reset(prompt, 7)]
    answers = [await game.step(Action(turn, ())) for turn in turns]
    await game.close()
    return said + [[one.observation, one.reward, one.done] for one in answers]


print(json.dumps([asyncio.run(play(10, ["4", "5"])), asyncio.run(play(8, "123")), CLOSED]))
