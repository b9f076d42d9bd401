"""Last lines of a training run: time, held-out metrics, folder, next commands."""

import re
from collections.abc import Iterator
from pathlib import Path

from rayrlhf.observe.metrics import read_metrics
from rayrlhf.observe.progress import duration
from rayrlhf.observe.resampling import bootstrap_mean
from rayrlhf.observe.samples import read_samples

EVALUATIONS = "evaluation"
"""Folder with all responses to the held-out prompts, one Parquet file per evaluation."""
_SHOWN = ("score", "accuracy", "loss")


def closing_lines(folder: Path, steps: int, seconds: float, *, chat: bool = True, merged: bool = False) -> Iterator[str]:
    """Yield the lines.

    Args:
        folder: the run folder.
        steps: steps of the run.
        seconds: wall time of the command.
        chat: the exported model generates text.
        merged: the command folds adapters, if any, into the exported model.
    """
    path = folder.absolute()
    yield f"finished: {steps} steps, {duration(seconds)} in this command"
    yield from held_out_lines(path)
    yield f"run folder: {path}"
    adapted = merged and re.search(r"(?m)^model:\n(  .*\n)*?  lora:\n", (path / "config.yaml").read_text(encoding="utf-8"))
    yield f"model: {path / 'export'}{' (adapters merged into their base model)' if adapted else ''}"
    yield f"next: rayrlhf report {path}"
    if chat:
        yield f"      rayrlhf chat {path}"
        yield f"      rayrlhf evaluate FILE model.path={path}"


def folder_line(folder: Path) -> list[str]:
    """Return the last line of a command without training."""
    return [f"folder: {folder.absolute()}"]


def held_out_lines(folder: Path) -> Iterator[str]:
    """Yield the first and last evaluation of a run, scores with their interval over prompts."""
    rows = [row for row in read_metrics(folder) if any(f"evaluation/{name}" in row for name in _SHOWN)]
    if not rows:
        return
    first, last = rows[0], rows[-1]
    for name in _SHOWN:
        before, after = first.get(f"evaluation/{name}"), last.get(f"evaluation/{name}")
        if before is None or after is None:
            continue
        texts = [
            f"{value:.3f}{_interval(folder, row['step']) if name == 'score' else ''}"
            for value, row in ((before, first), (after, last))
        ]
        yield f"held-out {name}: {texts[0]} at step {first['step']}, {texts[1]} at step {last['step']}"


def _interval(folder: Path, step: int) -> str:
    scores = [row["score"] for row in read_samples(folder / EVALUATIONS) if row["step"] == step]
    if not scores:
        return ""
    found = bootstrap_mean(scores)
    return f" [{found.low:.3f}, {found.high:.3f}]"
