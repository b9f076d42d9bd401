"""`metrics.jsonl`: one JSON line per step, on the disk before the next step starts.

Resumed runs continue the file and reports read it, so it is valid at any moment: a line is appended by one write and fsynced.
Readers skip an incomplete last line (a killed process, a full disk), and the next writer removes it. Resuming from an earlier
checkpoint removes the later lines. JSON has no NaN: a non-finite number is written as null, and `metrics/non_finite` counts
them.
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
"""Key of the number of NaN and infinite values in a step; absent for none."""


class MetricsSink:
    """Appends to a run folder's `metrics.jsonl`."""

    def __init__(self, folder: Path) -> None:
        """Open the file for appending and remove an incomplete last line.

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
            step: written as `step`, which cannot be the name of a metric.
            metrics: name -> number; integers stay integers.

        Raises:
            UserError: the file cannot be written. It then ends in its last complete line.
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
            UserError: the file cannot be written, or is damaged before its last line.
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
    """Return the lines of a run folder's `metrics.jsonl`, oldest first.

    An incomplete last line is left out.

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
    """Write all data; one system call may write a part only."""
    while data:
        data = data[os.write(descriptor, data) :]
