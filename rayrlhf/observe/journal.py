"""`recovery.jsonl`: one JSON line for each lost or rebuilt process and each rollback."""

import json
import time
from pathlib import Path
from typing import Any

from rayrlhf.storage.atomic import writing

FILE_NAME = "recovery.jsonl"
MIRROR = "mirror"
"""Event of a checkpoint whose copy to its mirror failed."""


class RecoveryJournal:
    """Appends to a run folder's `recovery.jsonl`; the first event creates the file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME

    def write(self, event: str, actor: str, reason: str, seconds: float) -> None:
        """Append one event.

        Args:
            event: "lost", "recovered", "hung", "silent", "replayed", "resumed", "joined" or "left", or `MIRROR`.
            actor: `<run>/<role>/<rank>`; the run for a copy.
            seconds: time since the loss, for a recovery.

        Raises:
            UserError: the file cannot be written.
        """
        row = {"time": time.time(), "event": event, "actor": actor, "seconds": round(seconds, 3), "reason": reason}
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run, oldest first, without an incomplete last line."""
    path = folder / FILE_NAME
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
