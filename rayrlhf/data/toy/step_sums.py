"""Sums of several digits, solved step by step, with wrong steps planted in some solutions.

`3+5+9=` has the steps `3+5=8` and `8+9=17`, each with a label. A planted step has a typical mistake in its result; the steps
after it go on from that result and are right by themselves, as labels of process reward models usually have it. The split of
a sum is defined by a hash of its digits, so no held-out sum is ever trained on, for any seeds and counts.
"""

import hashlib
import random
from typing import Any, Literal

Split = Literal["train", "evaluation"]
EVALUATION_SHARE = 5
"""One in this many sums is held out."""
FEWEST, MOST = 3, 6
"""Digits of a sum."""
WRONG = 20
"""Default percentage of wrong steps."""
MAX_ROWS = 100_000


def generate(seed: int, count: int, split: Split, wrong: int = 0) -> list[dict[str, Any]]:
    """Return rows with `prompt`, `completions` (the steps), `labels` and the right `answer`.

    Args:
        seed: random seed; equal arguments give equal rows, and a smaller count the first of them.
        count: number of rows.
        split: train or evaluation.
        wrong: percent of the steps that are planted wrong ones; 0 for the default.
    """
    draw = random.Random(f"step sums {seed} {split}")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        digits = [draw.randint(1, 9) for _ in range(draw.randint(FEWEST, MOST))]
        if split_of(digits) == split:
            steps, labels = solve(digits, draw, wrong or WRONG)
            prompt = f"{'+'.join(map(str, digits))}="
            rows.append({"prompt": prompt, "completions": steps, "labels": labels, "answer": str(sum(digits))})
    return rows


def solve(digits: list[int], draw: random.Random, wrong: int) -> tuple[list[str], list[bool]]:
    """Return the steps of a solution and their labels.

    Args:
        digits: the terms of the sum, two or more.
        draw: the solver's own randomness.
        wrong: percent of the steps whose result is wrong, independently of each other.
    """
    steps, labels, total = [], [], digits[0]
    for digit in digits[1:]:
        right = draw.random() * 100 >= wrong
        result = total + digit if right else draw.choice(mistakes(total, digit))
        steps.append(f"{total}+{digit}={result}")
        labels.append(right)
        total = result
    return steps, labels


def mistakes(total: int, digit: int) -> list[int]:
    """Return typical wrong results of a step, without duplicates.

    A carry is dropped or added, the count is one or two off, or the term is left out.
    """
    right = total + digit
    near = (right - 10, right + 10, right - 1, right + 1, right - 2, right + 2, total)
    return [result for result in dict.fromkeys(near) if result > 0 and result != right]


def split_of(digits: list[int]) -> Split:
    """Return the split that a sum belongs to, by a hash of its digits."""
    digest = hashlib.sha256("+".join(map(str, digits)).encode()).digest()
    return "evaluation" if digest[0] % EVALUATION_SHARE == 0 else "train"
