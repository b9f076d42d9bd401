"""Live view of a training run, from the run folder's `metrics.jsonl`."""

import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rayrlhf.observe.journal import FILE_NAME as JOURNAL
from rayrlhf.observe.live import LiveView
from rayrlhf.observe.metrics import FILE_NAME, read_metrics

POLL_SECONDS = 0.5


class Follower:
    """Incremental reader of a metrics file.

    A file that was rewound is read from its start again.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        self._offset = offset
        self._last = b""

    def rows(self) -> list[dict[str, Any]]:
        """Return new complete lines."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            # A resumed run may have rewound the file and written beyond the offset between two polls.
            rewound = file.seek(0, 2) < self._offset
            file.seek(self._offset - len(self._last))
            if rewound or file.read(len(self._last)) != self._last:
                self._offset, self._last = 0, b""
                file.seek(0)
            lines = file.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        self._offset += sum(map(len, whole))
        self._last = whole[-1] if whole else self._last
        return [json.loads(line) for line in whole]


@contextmanager
def following(folder: Path, view: LiveView, total: int) -> Iterator[None]:
    """Show a run's steps, evaluations and lost workers inside the block."""
    earlier = [int(row["step"]) for row in read_metrics(folder) if "loss" in row]
    view.start(total, max(earlier, default=0))
    follower, done, shown = Follower(folder / FILE_NAME), threading.Event(), set(earlier)
    journal = folder / JOURNAL
    losses = Follower(journal, journal.stat().st_size if journal.exists() else 0)
    loading = ExitStack()
    loading.enter_context(view.wait("loading the model, up to the first step"))

    def show() -> None:
        for row in follower.rows():
            step = int(row["step"])
            if "loss" in row and step not in shown:
                loading.close()
                shown.add(step)
                view.step(step, row)
            elif "evaluation/loss" in row and row["evaluation/loss"] is not None:
                view.note(f"step {step}: held-out {evaluation_text(row)}")

        for event in losses.rows():
            view.note(f"{event['actor']}: {event['event']} ({event['reason']})")

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
        loading.__exit__(*sys.exc_info())


def evaluation_text(row: Mapping[str, Any]) -> str:
    """Return the held-out metrics of a row as text."""
    shown = ("loss", "accuracy", "calibration_error")
    found = [(name, row.get(f"evaluation/{name}")) for name in shown]
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found if value is not None)
