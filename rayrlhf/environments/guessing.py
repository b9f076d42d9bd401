"""`guessing`: a game. The policy guesses a hidden number and hears whether it is higher or lower."""

import random
import re

from rayrlhf.data.records import Prompt
from rayrlhf.environments.protocol import Action, Answer


class Guessing:
    """The hidden number follows from the prompt, so that all samples of a group play the same game.

    Args:
        low: smallest number.
        high: largest number.
        right: reward of the right guess, which ends the game.
        wrong: reward of any other turn; a little below 0 makes short games better.
        column: dataset column that holds the number; drawn from `low` to `high` by the prompt's id when not given.
    """

    def __init__(
        self, low: int = 0, high: int = 9, right: float = 1.0, wrong: float = -0.05, column: str | None = None
    ) -> None:
        self._low, self._high = low, high
        self._right, self._wrong = right, wrong
        self._column = column
        self._hidden = low

    async def reset(self, prompt: Prompt, seed: int) -> str:
        """Hide a number; says nothing."""
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
