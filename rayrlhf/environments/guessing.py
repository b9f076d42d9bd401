"""`guessing`: a game in which the policy guesses a hidden number from `<` and `>`."""

import random
import re

from rayrlhf.data.records import Prompt
from rayrlhf.environments.protocol import Action, Answer


class Guessing:
    """Game with a number hidden per prompt, the same for all samples of a group.

    Args:
        high: largest number.
        right: reward of the right guess, which ends the game.
        wrong: reward of any other turn; slightly below 0 favors short games.
        column: dataset column with the number; drawn from `low` to `high` by the prompt's id when not given.
    """

    def __init__(
        self, low: int = 0, high: int = 9, right: float = 1.0, wrong: float = -0.05, column: str | None = None
    ) -> None:
        self._low, self._high = low, high
        self._right, self._wrong = right, wrong
        self._column = column
        self._hidden = low

    async def reset(self, prompt: Prompt, seed: int) -> str:
        """Hide a number; returns no text."""
        drawn = random.Random(f"guessing {prompt.id}").randint(self._low, self._high)
        self._hidden = int(prompt.columns[self._column]) if self._column else drawn
        return ""

    async def step(self, action: Action) -> Answer:
        """Compare the last number of the turn."""
        numbers = re.findall(r"\d{1,18}", action.text)
        if not numbers:
            return Answer("?", self._wrong)
        guess = int(numbers[-1])
        if guess == self._hidden:
            return Answer(reward=self._right, done=True)
        return Answer("<" if self._hidden < guess else ">", self._wrong)
