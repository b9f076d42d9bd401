"""Generated datasets: `builtin:NAME`, with options such as `?seed=1&count=2000`.

Each has the splits train and evaluation, whose contents never overlap for any seeds.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qsl

from rayrlhf.data.toy import mappings, played_turns, step_sums, summands, sums, word_problems
from rayrlhf.errors import UserError

BUILTIN = "builtin:"
Split = Literal["train", "evaluation"]


@dataclass(frozen=True, slots=True)
class BuiltinDataset:
    """A generated dataset.

    Attributes:
        generate: called with seed, count and split, and with its own options by name; returns rows.
        prompt_field: the column of the prompt.
        counts: default number of rows of each split.
        maximum: maximum value of each option, `count` included.
    """

    generate: Callable[..., Sequence[Mapping[str, Any]]]
    prompt_field: str
    counts: Mapping[str, int]
    maximum: Mapping[str, int]


BUILTIN_DATASETS = {
    "word-problems": BuiltinDataset(
        word_problems.generate,
        "question",
        {"train": 4000, "evaluation": 500},
        {
            "count": word_problems.MAX_ROWS,
            "operations": word_problems.MAX_OPERATIONS,
            "largest": word_problems.MAX_NUMBER,
        },
    ),
    "sums": BuiltinDataset(
        sums.generate, "prompt", {"train": 6000, "evaluation": 500}, {"count": sums.MAX_ROWS, "careless": 100}
    ),
    "sum-pairs": BuiltinDataset(
        sums.generate_pairs, "prompt", {"train": 20_000, "evaluation": 500}, {"count": sums.MAX_ROWS, "careless": 100}
    ),
    "summands": BuiltinDataset(summands.generate, "prompt", {"train": 20_000, "evaluation": 500}, {"count": summands.MAX_ROWS}),
    "step-sums": BuiltinDataset(
        step_sums.generate, "prompt", {"train": 20_000, "evaluation": 500}, {"count": step_sums.MAX_ROWS, "wrong": 100}
    ),
    "mappings": BuiltinDataset(
        mappings.generate,
        "prompt",
        {"train": 24_000, "evaluation": 480},
        {"count": mappings.MAX_ROWS, "task": mappings.MAX_TASKS},
    ),
    "calculations": BuiltinDataset(
        played_turns.calculations,
        "prompt",
        {"train": 20_000, "evaluation": 500},
        {"count": played_turns.MAX_ROWS, "calls": 100, "digits": played_turns.MAX_DIGITS, "chat": 1, "lookups": 100},
    ),
    "guesses": BuiltinDataset(
        played_turns.guesses,
        "prompt",
        {"train": 20_000, "evaluation": 500},
        {"count": played_turns.MAX_ROWS, "chat": 1, "listens": 100},
    ),
}


def read_builtin(path: str, split: str, subset: str | None, limit: int | None) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a built-in and the field of their prompts.

    Args:
        path: `builtin:NAME`, with `?seed=1&count=2000` to set seed and size.
        subset: must be None.
        limit: maximum number of rows.

    Raises:
        UserError: no such dataset, split or option.
    """
    name, _, query = path.removeprefix(BUILTIN).partition("?")
    dataset = BUILTIN_DATASETS.get(name)
    if dataset is None:
        near = difflib.get_close_matches(name, BUILTIN_DATASETS, n=1, cutoff=0.4)
        known = ", ".join(BUILTIN + other for other in BUILTIN_DATASETS)
        hint = f"did you mean {BUILTIN}{near[0]}?" if near else f"expected one of {known}"
        raise UserError(f"{path}: unknown built-in dataset; {hint}")
    if split not in ("train", "evaluation") or subset is not None:
        raise UserError(f"{path}: split {split}: expected train or evaluation, and no subset")
    options = {"seed": 0} | dict.fromkeys(dataset.maximum, 0) | {"count": dataset.counts[split]}
    for option, text in parse_qsl(query, keep_blank_values=True):
        if option not in options or not text.isdecimal():
            expected = " and ".join(f"{name}=N" for name in options)
            raise UserError(f"{path}: expected options {expected}, found {option}={text}")
        if int(text) > dataset.maximum.get(option, int(text)):
            raise UserError(f"{path}: {option}: expected at most {dataset.maximum[option]}, found {text}")
        options[option] = int(text)
    options["count"] = min(options["count"], limit or options["count"])
    rows = dataset.generate(split="train" if split == "train" else "evaluation", **options)
    return [dict(row) for row in rows], dataset.prompt_field
