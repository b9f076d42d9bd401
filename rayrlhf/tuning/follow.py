"""Live view of a training run, from the run folder's `metrics.jsonl`."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayrlhf.observe.live import LiveView
from rayrlhf.observe.metrics import FILE_NAME, read_metrics

POLL_SECONDS = 0.5


class Follower:
    """Incremental reader of a metrics file.

    A file that was rewound is read from its start again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def rows(self) -> list[dict[str, Any]]:
        """Return new complete lines."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            if file.seek(0, 2) < self._offset:
                self._offset = 0
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]


@contextmanager
def following(folder: Path, view: LiveView, total: int) -> Iterator[None]:
    """Show a run's steps and evaluations inside the block."""
    earlier = [int(row["step"]) for row in read_metrics(folder) if "loss" in row]
    view.start(total, max(earlier, default=0))
    follower, done, shown = Follower(folder / FILE_NAME), threading.Event(), set(earlier)

    def show() -> None:
        for row in follower.rows():
            step = int(row["step"])
            if "loss" in row and step not in shown:
                shown.add(step)
                view.step(step, row)
            elif "evaluation/loss" in row and row["evaluation/loss"] is not None:
                view.note(f"step {step}: held-out {evaluation_text(row)}")

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            show()

    thread = threading.Thread(target=watch, name="follow-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        show()


def evaluation_text(row: Mapping[str, Any]) -> str:
    """Return the held-out metrics of a row as text."""
    shown = ("loss", "accuracy", "calibration_error")
    found = [(name, row.get(f"evaluation/{name}")) for name in shown]
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found if value is not None)
