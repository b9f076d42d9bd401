"""`trace.json`: timeline of all actors for Perfetto (ui.perfetto.dev) and chrome://tracing.

The format is the JSON array of the Trace Event Format, in which the closing bracket is optional. Events are therefore appended
as they occur: memory is bounded, the file of a killed run loads, and a resumed run continues it. Actors are shown as processes;
their numbers derive from their names, so that they agree across restarts.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayrlhf.storage.atomic import writing

FILE_NAME = "trace.json"
BUFFERED_EVENTS = 256
TAIL_BYTES = 1 << 20
"""Bytes read from the end of an old file to find its last event; every event is much smaller."""


class TraceWriter:
    """Appends events to a run folder's `trace.json`; times are seconds since the epoch."""

    def __init__(self, folder: Path) -> None:
        """Open the file, and continue after the last complete event of an earlier run.

        Raises:
            UserError: the file cannot be written.
        """
        self.path = folder / FILE_NAME
        self._pending: list[str] = []
        self._named: set[int] = set()
        with writing(self.path):
            self._file = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
            self._empty = not self._seek_to_the_last_event()

    def span(
        self,
        name: str,
        actor: str,
        start: float,
        duration: float,
        *,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Add an event with a duration; a click on it shows `arguments`."""
        process, thread = _number(actor), _number(f"{actor}\0main")
        for number, kind, shown in ((process, "process_name", actor), (thread, "thread_name", "main")):
            if number not in self._named:
                self._named.add(number)
                naming = {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": shown}}
                self._pending.append(json.dumps(naming))
        times = {"ts": round(start * 1e6), "dur": round(duration * 1e6)}
        event = {"ph": "X", "name": name, **times, "args": dict(arguments or {}), "pid": process, "tid": thread}
        self._pending.append(json.dumps(event))
        if len(self._pending) >= BUFFERED_EVENTS:
            self.flush()

    def flush(self) -> None:
        """Write pending events; a crash after this loses none of them.

        Raises:
            UserError: the file cannot be written.
        """
        if not self._pending:
            return
        text = ("[\n" if self._empty else ",\n") + ",\n".join(self._pending)
        self._pending.clear()
        with writing(self.path):
            data = text.encode()
            while data:
                data = data[self._file.write(data) :]
        self._empty = False

    def close(self) -> None:
        """Write pending events and the closing bracket."""
        self.flush()
        with writing(self.path):
            self._file.write(b"[]\n" if self._empty else b"\n]\n")
        self._file.close()

    def _seek_to_the_last_event(self) -> bool:
        """Remove a closing bracket and an incomplete last event; an event ends in }.

        Returns True if any event is left.
        """
        size = self.path.stat().st_size
        base = max(0, size - TAIL_BYTES)
        self._file.seek(base)
        tail = self._file.read().rstrip(b"\n]")
        end = len(tail)
        if not _is_event(tail[tail.rfind(b"\n") + 1 :]):
            end = tail.rfind(b"},\n") + 1
        end = base + end if end else 0
        self._file.seek(end)
        self._file.truncate(end)
        os.fsync(self._file.fileno())
        return end > 0


def _is_event(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _number(name: str) -> int:
    return zlib.crc32(name.encode()) & 0x7FFFFFFF
