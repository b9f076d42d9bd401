"""Sums of two numbers: the smallest task with a right answer, for untrained models.

`37+58=` has the answer `95`. The split of a sum is defined by a hash of its numbers, so no held-out sum is ever trained on, for
any seeds and counts. The wrong answers of a pair are typical mistakes: a carry dropped or added, a digit off by one, digits
swapped. Completions can be careless: `careless` percent of those with a carry drop it. Above 50, a model trained on them is
wrong on most of these sums, though it has seen correct ones. With `careless`, the same percentage of pairs with a carry have
the sum without it as their wrong answer.
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Literal, TypeVar

Split = Literal["train", "evaluation"]
Item = TypeVar("Item")
EVALUATION_SHARE = 5
"""One in this many sums is held out."""

SMALLEST, LARGEST = 10, 99
MAX_ROWS = 100_000
"""There are 8,100 different sums; more rows repeat them."""


def generate(seed: int, count: int, split: Split, careless: int = 0) -> list[dict[str, str]]:
    """Return rows with `prompt`, `completion` and the right `answer`.

    Args:
        seed: random seed; equal arguments give equal rows, and a smaller count the first of them.
        count: number of rows.
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
    """Return rows with `prompt`, a right `chosen` and a wrong `rejected`; see `generate`."""
    draw, slips = random.Random(f"sum pairs {seed} {split}"), random.Random(f"careless pairs {seed} {split}")
    rows = []
    for left, right in _take(count, split, draw):
        wrong = draw.choice(mistakes(left, right))
        if slips.random() * 100 < careless and left % 10 + right % 10 >= 10:
            wrong = str(left + right - 10)
        rows.append({"prompt": f"{left}+{right}=", "chosen": str(left + right), "rejected": wrong})
    return rows


def mistakes(left: int, right: int) -> list[str]:
    """Return typical wrong answers to `left + right`, without duplicates, in a fixed order."""
    answer = left + right
    # A dropped carry takes 10 away, an invented one adds 10.
    near = [answer + step for step in (-10, 10, -1, 1, -2, 2, -9, 9, -11, 11, -20, 20, -100, 100) if answer + step >= SMALLEST]
    text = str(answer)
    swapped = text[:-2] + text[-1] + text[-2]
    return list(dict.fromkeys(wrong for wrong in [*map(str, near), swapped, text[:-1], text + text[-1]] if wrong != text))


def _take(count: int, split: Split, draw: random.Random) -> Iterator[tuple[int, int]]:
    """Yield all sums of the split in random order, reshuffled after each pass."""
    sums = [
        (left, right)
        for left in range(SMALLEST, LARGEST + 1)
        for right in range(SMALLEST, LARGEST + 1)
        if split_of(left, right) == split
    ]
    yield from shuffled_passes(sums, count, draw)


def shuffled_passes(items: list[Item], count: int, draw: random.Random) -> Iterator[Item]:
    """Yield `count` items in random order, all of them before any comes again."""
    taken = 0
    while taken < count:
        draw.shuffle(items)
        yield from items[: count - taken]
        taken += len(items)


def split_of(left: int, right: int) -> Split:
    """Return the split that a sum belongs to, by a hash of its numbers."""
    digest = hashlib.sha256(f"{left}+{right}".encode()).digest()
    return "evaluation" if digest[0] % EVALUATION_SHARE == 0 else "train"
