"""Preference rows for the chains of this folder: from a file in the format of Anthropic HH, or generated ones.

    python examples/preferences/make_rows.py data/preferences PATH/helpful-base/train.jsonl.gz
    python examples/preferences/make_rows.py data/preferences-tiny

Both have rows with `chosen` and `rejected`, transcripts or lists of messages that differ in their last answer only. They are
written as {prompt, chosen, rejected} to four files: `policy.jsonl` (SFT and the prompts of PPO), `proxy.jsonl` and `gold.jsonl`
(one reward model each) and `held_out.jsonl`. Conversations with the same first turn are in the same file.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rayrlhf.config.data import PreferenceDatasetSection
from rayrlhf.data.dataset_rows import open_rows
from rayrlhf.data.messages import Message, as_conversation, is_transcript, read_transcript
from rayrlhf.data.row_files import place_of
from rayrlhf.data.templates import check_turns
from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import write_atomically, writing

Row = dict[str, list[Message]]
SHARES = {"policy": 0.3, "proxy": 0.25, "gold": 0.25, "held_out": 0.2}
"""Share of the rows in each file, by its name."""
SOUNDS = {"cow": "moo", "cat": "meow", "dog": "woof", "duck": "quack", "pig": "oink", "frog": "croak", "bee": "buzz"}
NAMES = "Ann Ben Cat Dan Eve Fay Gus Hal Ida Jim Kay Lee Mia Ned Oda Pam Ray Sue Tom Una Val Wes Xia Yan Zoe Bob Meg Lou Amy"


def convert(row: Mapping[str, Any], place: str) -> Row | str:
    """Return a row as {prompt, chosen, rejected}, or the reason to leave it out.

    Raises:
        UserError: `chosen` or `rejected` is no conversation; names the place.
    """
    chosen, rejected = (_turns(row.get(name), f"{place}: {name}") for name in ("chosen", "rejected"))
    prompt = chosen[:-1]
    if prompt != rejected[:-1] or chosen[-1]["role"] != rejected[-1]["role"]:
        return "differ before the last answer"
    if [turn["role"] for turn in chosen[-2:]] != ["user", "assistant"]:
        return "no answer at the end"
    if not all(turn["content"].strip() for turn in (*chosen, *rejected)):
        return "an empty turn"
    return "equal answers" if chosen == rejected else {"prompt": prompt, "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _turns(value: object, where: str) -> list[Message]:
    turns = read_transcript(value) if isinstance(value, str) and is_transcript(value) else as_conversation(value)
    if not isinstance(turns, list):
        raise UserError(f"{where}: expected a transcript with Human: and Assistant:, or messages, found {str(value)[:40]!r}")
    return check_turns(turns, where)


def characters(row: Row) -> int:
    """Return the characters of a row's prompt with its longer answer."""
    answers = (row[name][0]["content"] for name in ("chosen", "rejected"))
    return sum(len(turn["content"]) for turn in row["prompt"]) + max(map(len, answers))


def read_source(path: Path, count: int, longest: int) -> tuple[list[Row], Counter[str]]:
    """Return the first usable rows of a file, and the number of others by reason.

    Args:
        path: JSON lines, also compressed by gzip; or another format that `data.train.path` takes.
        count: maximum rows; the rest of the file is not read.
        longest: maximum characters of a prompt with its answer.

    Raises:
        UserError: no such file, or a row without conversations in `chosen` and `rejected`.
    """
    kept: list[Row] = []
    others: Counter[str] = Counter()
    for part in open_rows(PreferenceDatasetSection(path=str(path))).slices:
        for numbers, values in part.chunks():
            for number, value in zip(numbers, values, strict=True):
                row = convert(value, place_of(str(path), number))
                if isinstance(row, str):
                    others[row] += 1
                elif characters(row) > longest:
                    others[f"more than {longest} characters"] += 1
                else:
                    kept.append(row)
                if len(kept) == count:
                    return kept, others
    return kept, others


def generate(seed: int) -> Iterator[dict[str, str]]:
    """Yield 203 pairs about the sounds of animals, as transcripts.

    The better answer is right or, among equally right ones, a sentence. A tenth of the labels is wrong, and every third
    conversation has an earlier turn.
    """
    draw = random.Random(f"preferences {seed}")
    for number, (name, animal) in enumerate((name, animal) for name in NAMES.split() for animal in SOUNDS):
        wrong = draw.choice([sound for other, sound in SOUNDS.items() if other != animal])
        by_quality = [wrong, f"The {animal} says {wrong}.", SOUNDS[animal], f"The {animal} says {SOUNDS[animal]}."]
        worse, better = sorted(draw.sample(range(4), 2), reverse=draw.random() < 0.1)
        start = f"\n\nHuman: I am {name}.\n\nAssistant: Hi!\n\nHuman: " if number % 3 == 0 else f"\n\nHuman: {name} asks: "
        prompt = f"{start}What does the {animal} say?\n\nAssistant: "
        yield {"chosen": prompt + by_quality[better], "rejected": prompt + by_quality[worse]}


def split(rows: Iterable[Row], seed: int) -> dict[str, list[Row]]:
    """Divide rows over the files by their first turns.

    Raises:
        UserError: too few different first turns for four files.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt"][0]["content"], []).append(row)
    order = list(groups)
    random.Random(f"split {seed}").shuffle(order)
    total = sum(map(len, groups.values()))
    files: dict[str, list[Row]] = {name: [] for name in SHARES}
    for first in order:
        emptiest = min(files, key=lambda name: len(files[name]) / (SHARES[name] * total))
        files[emptiest] += groups[first]
    if not all(files.values()):
        raise UserError(f"{total} rows with {len(order)} different first turns: expected enough for {', '.join(files)}")
    return files


def make_rows(folder: Path, source: Path | None, count: int, longest: int, seed: int) -> list[str]:
    """Write the four files; returns lines with their rows and with what was left out.

    Raises:
        UserError: see `read_source`; a folder that cannot be written.
    """
    if source is None:
        converted = [convert(row, f"row {number}") for number, row in enumerate(generate(seed), 1)]
        rows, others = [row for row in converted if not isinstance(row, str)], Counter[str]()
    else:
        rows, others = read_source(source, count, longest)
    files = split(rows, seed)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, own in files.items():
            write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in own))
    lines = [f"{folder / name}.jsonl: {len(own)} rows" for name, own in files.items()]
    return [*lines, *(f"left out: {count} rows, {reason}" for reason, count in others.most_common())]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write preference rows for the chains of examples/preferences.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("source", type=Path, nargs="?", help="A file in the format of Anthropic HH; generated rows without it.")
    parser.add_argument("--rows", type=int, default=2000, help="Maximum rows of the source.")
    parser.add_argument("--characters", type=int, default=700, help="Maximum characters of a prompt with its answer.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        print("\n".join(make_rows(given.folder, given.source, given.rows, given.characters, given.seed)))
    except UserError as error:
        parser.error(str(error))
