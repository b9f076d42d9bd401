"""Short word problems from templates: a dataset for first runs, without a download.

A problem has a template, numbers, names and things. Its split is defined by a hash of template and numbers, so no sum of the
evaluation split is ever trained on, not even with other names, for any seeds and counts. Texts have one or two steps of +, -
and *, numbers up to 20 (12 in products), and a non-negative answer.
"""

import hashlib
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from rayrlhf.errors import UserError

Split = Literal["train", "evaluation"]
EVALUATION_SHARE = 10
"""One in this many combinations of template and numbers is held out."""

MAX_ROWS = 20_000
"""Well below the number of problems there are, so that a draw rarely repeats one."""
MAX_OPERATIONS, MAX_NUMBER = 2, 20
_TRIES = 200

NAMES = (
    "Ada", "Bo", "Cleo", "Dan", "Ema", "Finn", "Gia", "Hugo", "Ines", "Jon", "Kira", "Leo",
    "Mia", "Nils", "Olga", "Paul", "Rosa", "Sam", "Tara", "Uma", "Vera", "Will", "Yuki", "Zoe",
)  # fmt: skip
THINGS = (
    "apples", "books", "coins", "shells", "pens", "stamps", "marbles", "cards", "buttons", "cookies", "stickers", "plums",
    "stones", "beads", "nuts", "tickets",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Template:
    """One kind of problem.

    Attributes:
        text: with placeholders {a} and {b} for names, {things}, and {x}, {y}, {z} for numbers.
        working: the arithmetic expression of the answer, with the same placeholders.
        answer: from x, y, z; numbers whose answer is negative are not used.
        limits: the largest x, y and z; each is at least 2. A limit of 2 stands for a number that the text does not use.
    """

    text: str
    working: str
    answer: Callable[[int, int, int], int]
    limits: tuple[int, int, int]


TEMPLATES = (
    Template(
        "{a} has {x} {things} and buys {y} more. How many {things} does {a} have now?",
        "{x} + {y}", lambda x, y, z: x + y, (20, 20, 2),
    ),
    Template(
        "{a} found {x} {things} and {b} found {y}. How many did they find together?",
        "{x} + {y}", lambda x, y, z: x + y, (20, 20, 2),
    ),
    Template(
        "{a} had {x} {things} and gave {y} to {b}. How many {things} does {a} have left?",
        "{x} - {y}", lambda x, y, z: x - y, (20, 20, 2),
    ),
    Template(
        "{a} needs {x} {things} and already has {y}. How many more must {a} get?",
        "{x} - {y}", lambda x, y, z: x - y, (20, 20, 2),
    ),
    Template(
        "{a} fills {x} boxes with {y} {things} each. How many {things} is that in all?",
        "{x} * {y}", lambda x, y, z: x * y, (12, 12, 2),
    ),
    Template(
        "Each of {x} friends brings {y} {things}. How many {things} do they bring?",
        "{x} * {y}", lambda x, y, z: x * y, (12, 12, 2),
    ),
    Template(
        "{a} has {x} bags of {y} {things} and {z} loose ones. How many {things} does {a} have?",
        "{x} * {y} + {z}", lambda x, y, z: x * y + z, (9, 9, 12),
    ),
    Template(
        "{a} buys {x} packs of {y} {things} and loses {z} of them. How many {things} are left?",
        "{x} * {y} - {z}", lambda x, y, z: x * y - z, (9, 9, 12),
    ),
    Template(
        "{a} had {x} {things}, gave {y} to {b} and then got {z} more. How many does {a} have now?",
        "{x} - {y} + {z}", lambda x, y, z: x - y + z, (20, 20, 20),
    ),
    Template(
        "A shop had {x} {things}. It sold {y} to {a} and {z} to {b}. How many {things} remain?",
        "{x} - {y} - {z}", lambda x, y, z: x - y - z, (20, 12, 12),
    ),
    Template(
        "{a} has {x} {things}. {b} has {y} more than {a}. How many do they have together?",
        "{x} + {x} + {y}", lambda x, y, z: 2 * x + y, (12, 12, 2),
    ),
    Template(
        "{a} and {b} each pick {x} {things} and then eat {y} in all. How many {things} are left?",
        "{x} + {x} - {y}", lambda x, y, z: 2 * x - y, (12, 20, 2),
    ),
)  # fmt: skip


def generate(seed: int, count: int, split: Split, operations: int = 0, largest: int = 0) -> list[dict[str, str]]:
    """Return `count` different problems; a larger count extends a smaller one.

    Args:
        seed: selects the problems, but never the split of a problem.
        count: number of rows, at most `MAX_ROWS`.
        split: "train" or "evaluation".
        operations: maximum number of arithmetic operations in a problem; 0 for all problems.
        largest: largest number in a text; 0 for the limits of the templates.

    Returns:
        Rows with `question`, 17 to 32 tokens of a usual vocabulary, `answer`, the number in digits, and `solution`, a worked
        response such as `3 + 4 = 7 pens. Answer: 7`.

    Raises:
        UserError: there are fewer problems of these operations and numbers.
        ValueError: an unknown split, or a count out of range.
    """
    if split not in ("train", "evaluation"):
        raise ValueError(f"split {split!r}: expected train or evaluation")
    if not 0 <= count <= MAX_ROWS:
        raise ValueError(f"count {count}: expected 0 to {MAX_ROWS}")
    kinds = [kind for kind, template in enumerate(TEMPLATES) if _operations(template) <= (operations or MAX_OPERATIONS)]
    choices = {kind: numbers for kind in kinds if (numbers := _numbers_of(kind, split, largest or MAX_NUMBER))}
    kinds = list(choices)
    generator = random.Random(f"word problems {seed}")
    rows: dict[str, dict[str, str]] = {}
    tries = itertools.count()
    while len(rows) < count:
        if not kinds or next(tries) > _TRIES * count:
            raise UserError(
                f"word-problems: expected count={len(rows)} or less in the {split} split with operations={operations} and "
                f"largest={largest}, found count={count}"
            )
        kind = generator.choice(kinds)
        x, y, z = generator.choice(choices[kind])
        first, second = generator.sample(NAMES, 2)
        things = generator.choice(THINGS)
        template = TEMPLATES[kind]
        places = {"a": first, "b": second, "things": things, "x": x, "y": y, "z": z}
        question, answer = template.text.format(**places), str(template.answer(x, y, z))
        solution = f"{template.working.format(**places)} = {answer} {things}. Answer: {answer}"
        rows[question] = {"question": question, "answer": answer, "solution": solution}
    return list(rows.values())


def _operations(template: Template) -> int:
    return len(template.working.split()) // 2


@cache
def _numbers_of(kind: int, split: Split, largest: int) -> tuple[tuple[int, int, int], ...]:
    """Return all numbers of a template in a split, the same on every machine."""
    template = TEMPLATES[kind]
    found = []
    xs, ys, zs = (range(2, min(limit, largest) + 1) for limit in template.limits)
    for numbers in itertools.product(xs, ys, zs):
        digest = hashlib.blake2b(repr((kind, *numbers)).encode(), digest_size=4).digest()
        held_out = int.from_bytes(digest, "little") % EVALUATION_SHARE == 0
        if template.answer(*numbers) >= 0 and held_out == (split == "evaluation"):
            found.append(numbers)
    return tuple(found)
