"""Number after number plus three, and a fifth of the responses wrong: a dataset in which every mistake is known.

    5 6 4 1 3 4 9 1=8 9 7 4 6 7 2 4

Each number of the response is that of the prompt plus three, modulo 10. Half of the wrong ones make the same slip (the fifth
number is copied as it is), the other half a random one (one number is off by 1 to 9). Which rows are wrong cannot be told from
their prompts.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

NUMBERS = 8
ADDED = 3
COPIED = 4
"""Place of the number that the systematic slip leaves as it is."""
WRONG_SHARE = 0.2
HELD_OUT = 2000


def worked(numbers: Sequence[int], slip_at: int | None = None, slip: int = 0) -> str:
    """Return the response; `slip` is added at one place."""
    return " ".join(str((number + ADDED + (slip if place == slip_at else 0)) % 10) for place, number in enumerate(numbers))


def wrong(numbers: Sequence[int], draw: random.Random) -> tuple[str, str]:
    """Return a wrong response and the kind of its mistake."""
    if draw.random() < 0.5:
        return worked(numbers, COPIED, -ADDED), "systematic"
    return worked(numbers, draw.randrange(NUMBERS), draw.randrange(1, 10)), "random"


def make(folder: Path, count: int, seed: int) -> None:
    """Write `noisy.jsonl`, `clean.jsonl` and `held_out.jsonl` into a folder; no prompt occurs twice in them."""
    draw = random.Random(f"plus three {seed}")
    every = [[int(digit) for digit in f"{number:08}"] for number in draw.sample(range(10**NUMBERS), count + HELD_OUT)]
    clean = [row(numbers, worked(numbers), "none") for numbers in every]
    noisy = [
        row(numbers, *(wrong(numbers, draw) if draw.random() < WRONG_SHARE else (worked(numbers), "none"))) for numbers in every
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("noisy", noisy[HELD_OUT:]), ("clean", clean[HELD_OUT:]), ("held_out", clean[:HELD_OUT])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows), encoding="utf-8")


def row(numbers: Sequence[int], response: str, mistake: str) -> dict[str, str]:
    """Return one row of a dataset."""
    prompt = f"{' '.join(map(str, numbers))}="
    return {"prompt": prompt, "completion": response, "answer": worked(numbers), "mistake": mistake}


def right(responses: list[str], answer: list[str]) -> list[float]:
    """The verifier: 1 where the whole response is right."""
    return [float(response.strip() == expected) for response, expected in zip(responses, answer, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the dataset of the Pre-SFT example.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    make(given.folder, given.count, given.seed)
