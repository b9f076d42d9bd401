"""Class-to-label mappings: tasks that nothing but demonstrations can explain, for measuring in-context learning.

An item is a word of three letters, the last of which is its class (`hau` and `quu` are both of the class of u), as endings of
words are in many languages, so that the class can be seen on any item, known or not. A task gives each class a label of its
own, at random. Without demonstrations the best anyone can do is to guess a label; with one of the item's own class the answer
is certain; who only copies some label of the demonstrations is right as often as classes are alike. Which split a word or a
task belongs to follows from a hash, so the evaluation has neither a word nor a task that was ever trained on, whatever seeds
and counts are used.

`task=N` asks for one held-out task alone, in both splits: the one mapping that is moved into a model's weights by distillation,
with words to learn it from (train) and others to judge by (evaluation).
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
"""Of the two before it."""
LABELS = "PQRSTUVW"
ROWS_PER_TASK = 24
"""Consecutive rows of one task, all with different words."""
MOST_ROWS = 1_000_000
MOST_TASKS = 200
"""Of the held-out tasks that `task` can name."""


def generate(seed: int, count: int, split: Split, task: int = 0) -> list[dict[str, str]]:
    """Return rows with `prompt` (a word), `completion` and `answer` (its label), and `task`, equal for rows of one mapping.

    Args:
        seed: of the draw; equal arguments give equal rows, and a smaller count the first of them.
        count: number of rows; every `ROWS_PER_TASK` of them are another task.
        split: which side of the hash, of words and of tasks.
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
    """Return all tasks of a split in a fixed order that means nothing, each as the labels of the classes in turn."""
    tasks = ["".join(labels) for labels in itertools.permutations(LABELS, len(ENDINGS))]
    return sorted((task for task in tasks if _split(f"task {task}") == split), key=_digest)


@cache
def words(split: Split) -> list[list[str]]:
    """Return all words of a split by class."""
    stems = ["".join(letters) for letters in itertools.product(LETTERS, repeat=2)]
    spelt = [[stem + ending for stem in stems] for ending in ENDINGS]
    return [[word for word in of_class if _split(f"word {word}") == split] for of_class in spelt]


def _words(split: Split, draw: random.Random) -> list[tuple[int, str]]:
    """Draw the words of one task with their classes: classes at random, no word twice."""
    taken: dict[str, int] = {}
    while len(taken) < ROWS_PER_TASK:
        number = draw.randrange(len(ENDINGS))
        taken.setdefault(draw.choice(words(split)[number]), number)
    return [(number, word) for word, number in taken.items()]


def _split(text: str) -> Split:
    return "evaluation" if _digest(text)[0] % EVALUATION_SHARE == 0 else "train"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
