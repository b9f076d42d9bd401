"""Small Pre-SFT configurations and data for tests."""

import json

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.pipelines import PreSFTConfig

MODEL = "builtin:tiny?layers=2&hidden=64&context=128"


def digit_share(responses):
    """A verifier: the share of characters that are digits."""
    return [sum(character.isdigit() for character in text) / max(len(text), 1) for text in responses]


def write_pairs(path, count, **fields):
    """Pairs of short texts; `answer` makes up a response that came with the row."""
    with path.open("w") as file:
        for index in range(count):
            response = f"the answer to {index} is {index * 7}"
            given = response if index % 3 else f"no idea about {index}"
            row = {"prompt": f"question {index}?", "completion": response, "answer": given, "number": index}
            file.write(json.dumps(row | fields) + "\n")
    return path


def presft_config(folder, *overrides, count=50):
    path = folder / "pairs.jsonl"
    if not path.exists():
        write_pairs(path, count)
    own = [
        f"model.path={MODEL}",
        "model.dtype=float32",
        f"data.path={path}",
        f"run.root={folder / 'runs'}",
        "generate.backend=transformers",
        "generate.max_new_tokens=8",
        "pipeline.rows_per_part=16",
        "pipeline.stall_seconds=120",
    ]
    return load_config(PreSFTConfig, None, [*own, *overrides])
