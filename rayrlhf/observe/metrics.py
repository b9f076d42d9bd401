"""`metrics.jsonl`: one JSON object a line, one line a step, on the disk before the next step starts.

The file is the record that a resumed run continues and that a report reads, so it stays valid at any moment: a line is appended
by one write and fsynced, a half-written last line (a killed process, a full disk) is dropped by readers and cut off by the next
writer, and resuming from an earlier checkpoint takes the later lines out again. JSON has no NaN: a number that is not finite is
written as null, and `metrics/non_finite` counts them.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import write_atomically, writing

FILE_NAME = "metrics.jsonl"
NON_FINITE = "metrics/non_finite"
"""Key of the number of values that were NaN or infinite in a step; absent when there were none."""


class MetricsSink:
    """Appends to a run folder's `metrics.jsonl`."""

    def __init__(self, folder: Path) -> None:
        """Open the file for appending and cut off a torn last line.

        Raises:
            UserError: the file cannot be written.
        """
        self.path = folder / FILE_NAME
        self.non_finite_count = 0
        self._descriptor = -1
        self._open()

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Append one step's numbers; they are durable when this returns.

        Args:
            step: written as `step`, which is therefore no metric's name.
            metrics: name -> number; integers stay integers.

        Raises:
            UserError: the disk refuses. The file then ends in its last whole line.
        """
        values = {name: _plain(value) for name, value in metrics.items()}
        non_finite = sum(value is None for value in values.values())
        self.non_finite_count += non_finite
        line = {"step": step, **values} | ({NON_FINITE: non_finite} if non_finite else {})
        data = json.dumps(line, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        with writing(self.path):
            end = os.fstat(self._descriptor).st_size
            try:
                _write_all(self._descriptor, data)
                os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, end)
                raise

    def rewind(self, step: int) -> None:
        """Drop all lines of later steps, before a run continues after `step`.

        Raises:
            UserError: the disk refuses, or the file is damaged before its last line.
        """
        kept = [line for line in _whole_lines(self.path) if _parse(self.path, line)["step"] <= step]
        with writing(self.path):
            write_atomically(self.path, b"".join(line + b"\n" for _, line in kept))
        self.close()
        self._open()

    def close(self) -> None:
        """Close the file. The sink cannot be written after this."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _open(self) -> None:
        with writing(self.path):
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            content = self.path.read_bytes()
            if not content.endswith(b"\n") and content:
                os.ftruncate(self._descriptor, content.rfind(b"\n") + 1)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run folder's `metrics.jsonl`, oldest first; a half-written last line is left out.

    Raises:
        UserError: a line other than the last is damaged.
    """
    path = folder / FILE_NAME
    return [_parse(path, line) for line in _whole_lines(path)] if path.exists() else []


def _whole_lines(path: Path) -> list[tuple[int, bytes]]:
    return list(enumerate(path.read_bytes().split(b"\n")[:-1], start=1))


def _parse(path: Path, numbered_line: tuple[int, bytes]) -> dict[str, Any]:
    number, line = numbered_line
    try:
        parsed = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}:{number}: not a JSON object: {error}") from error
    if not isinstance(parsed, dict) or "step" not in parsed:
        raise UserError(f"{path}:{number}: expected a JSON object with a 'step'")
    return parsed


def _plain(value: SupportsFloat) -> int | float | None:
    if isinstance(value, int):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def _write_all(descriptor: int, data: bytes) -> None:
    """Write everything: the system may take a part of it first and refuse only then."""
    while data:
        data = data[os.write(descriptor, data) :]
