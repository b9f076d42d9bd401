"""Sums of two numbers: the smallest task with a right answer, for models that start from nothing.

`37+58=` asks for `95`. Which split a sum belongs to follows from a hash of its numbers, so no held-out sum is ever trained on,
whatever seeds and counts are used. The wrong answers of a pair are the mistakes that learners make: a carry dropped or added, a
digit off by one, digits swapped. Demonstrations can be careless: `careless` percent of those with a carry then drop it, so what
imitates them is wrong on most of these sums if it is more than half, though it has seen how they are done. Pairs can be about
that: with `careless`, so many percent of those with a carry have the sum without it as their wrong answer.
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Literal

Split = Literal["train", "evaluation"]
EVALUATION_SHARE = 5
"""One in this many sums is held out."""

SMALLEST, LARGEST = 10, 99
MOST_ROWS = 100_000
"""There are 8,100 different sums; more rows repeat them."""


def generate(seed: int, count: int, split: Split, careless: int = 0) -> list[dict[str, str]]:
    """Return rows with `prompt`, `completion` and the right `answer`.

    Args:
        seed: of the draw; equal arguments give equal rows, and a smaller count the first of them.
        count: number of rows.
        split: which side of the hash.
        careless: percent of the sums with a carry from ones to tens whose completion drops it.
    """
    rows = []
    slips = random.Random(f"careless {seed} {split}")
    for left, right in _take(count, split, random.Random(f"sums {seed} {split}")):
        answer = left + right
        carries = left % 10 + right % 10 >= 10
        slip = slips.random() * 100 < careless and carries
        rows.append({"prompt": f"{left}+{right}=", "completion": str(answer - 10 * slip), "answer": str(answer)})
    return rows


def generate_pairs(seed: int, count: int, split: Split, careless: int = 0) -> list[dict[str, str]]:
    """Return rows with `prompt`, a right `chosen` and a wrong `rejected`; arguments as for `generate`."""
    draw, slips = random.Random(f"sum pairs {seed} {split}"), random.Random(f"careless pairs {seed} {split}")
    rows = []
    for left, right in _take(count, split, draw):
        wrong = draw.choice(mistakes(left, right))
        if slips.random() * 100 < careless and left % 10 + right % 10 >= 10:
            wrong = str(left + right - 10)
        rows.append({"prompt": f"{left}+{right}=", "chosen": str(left + right), "rejected": wrong})
    return rows


def mistakes(left: int, right: int) -> list[str]:
    """Return the wrong answers that a learner might give to `left + right`, each once, in a fixed order."""
    answer = left + right
    # A dropped carry takes 10 away, an invented one adds 10.
    near = [answer + step for step in (-10, 10, -1, 1, -2, 2, -9, 9, -11, 11, -20, 20, -100, 100) if answer + step >= SMALLEST]
    text = str(answer)
    swapped = text[:-2] + text[-1] + text[-2]
    return list(dict.fromkeys(wrong for wrong in [*map(str, near), swapped, text[:-1], text + text[-1]] if wrong != text))


def _take(count: int, split: Split, draw: random.Random) -> Iterator[tuple[int, int]]:
    """Every sum of the split in a random order, again in another order once all were there."""
    sums = [
        (left, right)
        for left in range(SMALLEST, LARGEST + 1)
        for right in range(SMALLEST, LARGEST + 1)
        if split_of(left, right) == split
    ]
    taken = 0
    while taken < count:
        draw.shuffle(sums)
        yield from sums[: count - taken]
        taken += len(sums)


def split_of(left: int, right: int) -> Split:
    """Return the split that a sum belongs to, by a hash of its numbers."""
    digest = hashlib.sha256(f"{left}+{right}".encode()).digest()
    return "evaluation" if digest[0] % EVALUATION_SHARE == 0 else "train"
