"""Rows for retrieval from long contexts: one digit in random text, asked for at the end.

    python examples/long_context/make_rows.py data/long-context

writes {prompt, completion, answer} to `short.jsonl`, `long.jsonl` and `held_out.jsonl`. Prompts have 100 tokens of the byte
tokenizer in the first, 8,100 in the others. The digit is at a random place.
"""

import json
import random
import sys
from pathlib import Path

FILES = {"short": (3000, 100), "long": (48, 8100), "held_out": (50, 8100)}
"""Rows and characters of each file, by its name."""
QUESTION = "\nCode? "


def row(generator: random.Random, characters: int) -> dict[str, str]:
    """Return a prompt of a number of characters and its digit."""
    digit = str(generator.randrange(10))
    needle = f" code {digit} "
    text = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz   ", k=characters - len(needle) - len(QUESTION)))
    place = generator.randrange(len(text) + 1)
    return {"prompt": text[:place] + needle + text[place:] + QUESTION, "completion": digit, "answer": digit}


def main(folder: Path) -> None:
    """Write all files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (count, characters) in FILES.items():
        generator = random.Random(name)
        lines = (json.dumps(row(generator, characters)) + "\n" for _ in range(count))
        (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
