"""Numbers as sums of a digit and a rest, each with many right answers.

`537=` has nine, `1+536` to `9+528`, and a row has one of them, with 1 in two rows of three. The split of a number is
defined by a hash of it, so no held-out number is ever trained on, for any seeds and counts.
"""

import random

from rayrlhf.data.toy.sums import Split, shuffled_passes, split_of

SMALLEST, LARGEST = 100, 999
MAX_ROWS = 100_000
"""There are 900 different numbers; more rows repeat them, with digits drawn again."""


def generate(seed: int, count: int, split: Split) -> list[dict[str, str]]:
    """Return rows with `prompt`, one right `completion` and the number as `answer`.

    Args:
        seed: random seed; equal arguments give equal rows, and a smaller count the first of them.
        count: number of rows.
        split: train or evaluation.
    """
    # With equally frequent digits the last digit of the rest depends on both numbers together and on neither alone, and a
    # small model learns nothing of it from its first 20,000 samples.
    digits, weights = range(1, 10), [1 / digit**2 for digit in range(1, 10)]
    draw = random.Random(f"summands {seed} {split}")
    numbers = [number for number in range(SMALLEST, LARGEST + 1) if split_of(number, 0) == split]
    rows = []
    for number in shuffled_passes(numbers, count, draw):
        (digit,) = draw.choices(digits, weights)
        rows.append({"prompt": f"{number}=", "completion": f"{digit}+{number - digit}", "answer": str(number)})
    return rows
