"""Ablations that separate the mapping from question to answer from the form of an answer.

`format` gives each demonstration an answer drawn at random from all answers. The form and the label space stay, the mapping is
gone (Min et al. 2022, "Rethinking the Role of Demonstrations"). `flip` exchanges answers by one fixed rule for the whole run.
The mapping is there and contradicts the truth (Wei et al. 2023, "Larger language models do in-context learning differently").
A model that uses the mapping drops to chance under `format` and below chance under `flip`.

A control reads no question and copies an answer from the context.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from rayrlhf.demonstrations.example import Example
from rayrlhf.errors import UserError

Ablation = Literal["none", "flip", "format"]


class AnswerCorruptor:
    """Replaces the answers of demonstrations, never those of questions."""

    def __init__(self, ablation: Ablation, answers: Sequence[str], seed: int) -> None:
        """Fix the replacement of every answer.

        Args:
            ablation: `none` replaces nothing.
            answers: the answers of the pool, in any order.
            seed: of the permutation and the draws.

        Raises:
            UserError: an ablation of a pool with only one answer.
        """
        self._ablation, self._seed = ablation, seed
        self._answers = sorted(set(answers))
        if ablation != "none" and len(self._answers) < 2:
            raise UserError(f"ablation {ablation}: the pool has {len(self._answers)} different answers, expected at least 2")
        shuffled = random.Random(seed).sample(self._answers, len(self._answers))
        self._other = dict(zip(shuffled, [*shuffled[1:], *shuffled[:1]], strict=True))

    def corrupt(self, target: Example, demonstrations: Sequence[Example]) -> list[Example]:
        """Return the demonstrations of a target's context.

        A function of seed, target and demonstration only.
        """
        if self._ablation == "none":
            return list(demonstrations)
        if self._ablation == "flip":
            return [replace(shown, answer=self._other[shown.answer]) for shown in demonstrations]
        return [replace(shown, answer=self._drawn(target, shown)) for shown in demonstrations]

    def _drawn(self, target: Example, shown: Example) -> str:
        key = f"{self._seed}\0{target.identity}\0{shown.identity}".encode()
        return random.Random(hashlib.sha256(key).digest()).choice(self._answers)


def copy_control(demonstrations: Sequence[Example], answer: str) -> float:
    """Return the expected accuracy, in [0, 1], of copying a random demonstration's answer.

    0 without demonstrations.
    """
    if not demonstrations:
        return 0.0
    return sum(shown.answer == answer for shown in demonstrations) / len(demonstrations)
