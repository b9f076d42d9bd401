"""A run under observation: what its newest step shows, and which of it is new."""

import sys
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from rayrlhf.observe.diagnostics.checks import findings
from rayrlhf.observe.diagnostics.finding import Finding

FIRST, LAST = 40, 400
"""Rows that are kept of the start and of the end: no check looks at others, and a long run stays cheap to look at."""


class Diagnosis:
    """Takes a run's rows one by one.

    Attributes:
        found: what the newest rows show.
        fresh: those of them that the rows before did not show.
    """

    def __init__(self) -> None:
        self.found: list[Finding] = []
        self.fresh: list[Finding] = []
        self._first: list[Mapping[str, Any]] = []
        self._last: deque[Mapping[str, Any]] = deque(maxlen=LAST)

    def load(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take up a run that goes on: what it showed already is not fresh any more."""
        self._first.clear()
        self._last.clear()
        for row in rows:
            self._keep(row)
        self.found, self.fresh = findings([*self._first, *self._last]), []

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Look at one more row."""
        self._keep({**metrics, "step": step})
        known = {finding.name for finding in self.found}
        self.found = findings([*self._first, *self._last])
        self.fresh = [finding for finding in self.found if finding.name not in known]

    @property
    def metrics(self) -> dict[str, float]:
        """`alarm/NAME`: 1 for each finding."""
        return {f"alarm/{finding.name}": 1.0 for finding in self.found}

    def _keep(self, row: Mapping[str, Any]) -> None:
        # Names are put together anew at every step, and there are more bytes in them than in their numbers.
        kept = {sys.intern(name): value for name, value in row.items()}
        if len(self._first) < FIRST:
            self._first.append(kept)
        else:
            self._last.append(kept)
