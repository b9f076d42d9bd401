"""Class-to-label mappings for measuring in-context learning.

An item is a word of three letters whose last letter is its class (`hau` and `quu` are both of class u), so that the class of
any item is visible, known or not. A task maps each class to a label of its own, at random. Without demonstrations a model can
only guess a label; with a demonstration of the item's class the answer is certain; copying some label of the demonstrations is
right as often as classes coincide. The split of a word or a task is defined by a hash, so the evaluation has no word and no
task that was ever trained on, for any seeds and counts.

`task=N` selects one held-out task for both splits: the mapping that distillation moves into a model's weights, with words to
train on (train) and others to evaluate on (evaluation).
"""

import hashlib
import itertools
import random
from functools import cache
from typing import Literal

Split = Literal["train", "evaluation"]
EVALUATION_SHARE = 5
"""One in this many words, and one in this many tasks, is held out."""
ENDINGS = "uvwx"
"""The last letter of each class's words."""
LETTERS = "abcdefghijklmnopqrst"
"""Letters of the two positions before it."""
LABELS = "PQRSTUVW"
ROWS_PER_TASK = 24
"""Consecutive rows of one task, all with different words."""
MAX_ROWS = 1_000_000
MAX_TASKS = 200
"""Maximum of `task`."""


def generate(seed: int, count: int, split: Split, task: int = 0) -> list[dict[str, str]]:
    """Return rows with `prompt` (a word), `completion` and `answer` (its label), and `task`.

    Args:
        seed: random seed; equal arguments give equal rows, and a smaller count the first of them.
        count: number of rows; the task changes every `ROWS_PER_TASK` rows.
        split: side of the hash, for words and for tasks.
        task: from 1; every row is of this held-out task, and only the words depend on the split. 0 draws tasks of the split.
    """
    draw = random.Random(f"mappings {seed} {split} {task}")
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        labels = mappings("evaluation")[task - 1] if task else draw.choice(mappings(split))
        for number, word in _words(split, draw):
            label = labels[number]
            rows.append({"prompt": word, "completion": label, "answer": label, "task": labels})
    return rows[:count]


@cache
def mappings(split: Split) -> list[str]:
    """Return all tasks of a split as their labels by class, in a fixed order."""
    tasks = ["".join(labels) for labels in itertools.permutations(LABELS, len(ENDINGS))]
    return sorted((task for task in tasks if _split(f"task {task}") == split), key=_digest)


@cache
def words(split: Split) -> list[list[str]]:
    """Return all words of a split by class."""
    stems = ["".join(letters) for letters in itertools.product(LETTERS, repeat=2)]
    spelled = [[stem + ending for stem in stems] for ending in ENDINGS]
    return [[word for word in of_class if _split(f"word {word}") == split] for of_class in spelled]


def _words(split: Split, draw: random.Random) -> list[tuple[int, str]]:
    """Draw the words of one task with their classes: random classes, no word twice."""
    taken: dict[str, int] = {}
    while len(taken) < ROWS_PER_TASK:
        number = draw.randrange(len(ENDINGS))
        taken.setdefault(draw.choice(words(split)[number]), number)
    return [(number, word) for word, number in taken.items()]


def _split(text: str) -> Split:
    return "evaluation" if _digest(text)[0] % EVALUATION_SHARE == 0 else "train"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
