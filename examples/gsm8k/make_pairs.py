"""Preference pairs from `example_model_solutions.jsonl` of openai/grade-school-math: right solutions against wrong ones.

Every pair carries its question, by which `reward.yaml` holds pairs out. The questions are those of the test split: a policy
that learns from this reward model must not be evaluated on them.

    python examples/gsm8k/make_pairs.py PATH/example_model_solutions.jsonl data/gsm8k/pairs.jsonl
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import write_atomically


def pairs_of(row: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield {prompt, chosen, rejected} for each right and each wrong solution of a question, equal solutions once.

    Args:
        row: `question`, and one {is_correct, solution} a model.
    """
    # Dictionaries keep the order of the file, and each solution once.
    right: dict[str, None] = {}
    wrong: dict[str, None] = {}
    for value in row.values():
        if isinstance(value, dict) and value["solution"]:
            (right if value["is_correct"] else wrong)[value["solution"]] = None
    for chosen in right:
        yield from (
            {"prompt": row["question"], "chosen": chosen, "rejected": rejected} for rejected in wrong if rejected != chosen
        )


def make_pairs(source: Path, target: Path) -> int:
    """Write the pairs of a file of solutions; returns how many there are.

    Raises:
        UserError: no such file, or a row without question and solutions.
    """
    if not source.is_file():
        raise UserError(f"{source}: no such file; it is in grade_school_math/data of github.com/openai/grade-school-math")
    lines = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines += [json.dumps(pair) for pair in pairs_of(json.loads(line))]
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{source}: row {number}: expected a question and solutions with is_correct: {error!r}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, "".join(f"{line}\n" for line in lines))
    return len(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    print(f"{make_pairs(arguments.source, arguments.target)} pairs in {arguments.target}")
