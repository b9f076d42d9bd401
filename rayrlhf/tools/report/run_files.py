"""Tolerant readers of run folders: no writes, no locks, every file optional.

A run may be active, may have been killed in the middle of a line, and may be on storage that another machine writes. Unreadable
content is therefore left out and counted, so that the page can report it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rayrlhf.observe.metrics import FILE_NAME as METRICS
from rayrlhf.observe.trace import FILE_NAME as TRACE

Row = Mapping[str, float]


class MetricsTail:
    """Follows a `metrics.jsonl` that grows.

    Attributes:
        damaged: number of complete lines that were not JSON objects with a step.
        torn: True while the file ends in an incomplete line.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        self.damaged, self.torn = 0, False
        self._offset, self._identity = 0, -1

    def read(self) -> tuple[list[Row], bool]:
        """Return new rows with finite numbers, and True if they replace all earlier ones.

        A file that was replaced or truncated (a rollback to a checkpoint) is read from its beginning again.
        """
        try:
            with self.path.open("rb") as file:
                status = file.seek(0, 2)
                identity = self.path.stat().st_ino
                restarted = self._offset > 0 and (identity != self._identity or status < self._offset)
                if restarted:
                    self._forget()
                self._identity = identity
                file.seek(self._offset)
                content = file.read()
        except OSError:
            restarted = self._offset > 0
            self._forget()
            return [], restarted
        end = content.rfind(b"\n") + 1
        self._offset += end
        self.torn = end < len(content)
        parsed = [metrics_row(line) for line in content[:end].split(b"\n")[:-1]]
        self.damaged += sum(row is None for row in parsed)
        return [row for row in parsed if row is not None], restarted

    def _forget(self) -> None:
        self._offset, self._identity, self.damaged, self.torn = 0, -1, 0, False


def metrics_row(line: bytes) -> Row | None:
    """Return a line's finite numbers by name; None for an invalid line."""
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(parsed, dict) or not _is_number(parsed.get("step")):
        return None
    return {name: value for name, value in parsed.items() if _is_number(value)}


@dataclass(frozen=True, slots=True)
class WorkSpan:
    """One span of the trace; times in seconds since the epoch, `step` None if unknown."""

    name: str
    actor: str
    start: float
    end: float
    step: int | None


def read_spans(folder: Path) -> tuple[list[WorkSpan], int]:
    """Return the spans of a run's `trace.json`, and the number of invalid lines."""
    spans, actors, damaged = [], dict[int, str](), 0
    try:
        file = (folder / TRACE).open("rb")
    except OSError:
        return [], 0
    with file:
        for line in file:
            text = line.strip().strip(b"[],").strip()
            if not text:
                continue
            try:
                event = json.loads(text)
                if event["ph"] == "M" and event["name"] == "process_name":
                    actors[event["pid"]] = str(event["args"]["name"])
                elif event["ph"] == "X":
                    start, step = float(event["ts"]) / 1e6, event.get("args", {}).get("step")
                    end = start + float(event["dur"]) / 1e6
                    actor = actors.get(event["pid"], "?")
                    spans.append(WorkSpan(str(event["name"]), actor, start, end, step if isinstance(step, int) else None))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                damaged += 1
    return [span for span in spans if math.isfinite(span.start) and math.isfinite(span.end)], damaged


def read_mapping(path: Path) -> tuple[str, dict[str, Any]]:
    """Return text and content of a YAML or JSON file; both may be empty."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", {}
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return text, {}
    return text, content if isinstance(content, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; invalid lines and a missing file are ignored."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(parsed, dict):
            found.append(parsed)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
