"""A run under observation: what its newest step shows, and which of it is new."""

import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rayrlhf.observe.diagnostics.finding import Check, Finding
from rayrlhf.observe.diagnostics.history import History
from rayrlhf.observe.diagnostics.policy_checks import POLICY_CHECKS
from rayrlhf.observe.diagnostics.response_checks import RESPONSE_CHECKS
from rayrlhf.observe.diagnostics.system_checks import SYSTEM_CHECKS

CHECKS: tuple[Check, ...] = (*POLICY_CHECKS, *RESPONSE_CHECKS, *SYSTEM_CHECKS)
"""In reporting order."""
FIRST, LAST = 40, 400
"""Rows that are kept of the start and of the end: no check looks at others, and a long run stays cheap to look at."""


def findings(rows: Sequence[Mapping[str, float | None]]) -> list[Finding]:
    """Return the findings of the newest steps, alarms first.

    Args:
        rows: rows of `metrics.jsonl`, from the first step on. A metric may be missing or null.
    """
    history = History(rows)
    found = []
    for check in CHECKS:
        sign = check.look(history)
        if sign is not None:
            found.append(Finding(check.name, check.severity, sign.since, sign.evidence, check.remedy))
    return sorted(found, key=lambda finding: finding.severity != "alarm")


class Diagnosis:
    """Runs the checks after each row of metrics.

    Attributes:
        found: findings in the newest rows.
        fresh: findings that the previous rows did not have.
    """

    def __init__(self) -> None:
        self.found: list[Finding] = []
        self.fresh: list[Finding] = []
        self._first: list[Mapping[str, Any]] = []
        self._last: deque[Mapping[str, Any]] = deque(maxlen=LAST)

    def load(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Load the rows of a resumed run; their findings are not fresh."""
        self._first.clear()
        self._last.clear()
        for row in rows:
            self._keep(row)
        self.found, self.fresh = findings([*self._first, *self._last]), []

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a row and run the checks."""
        self._keep({**metrics, "step": step})
        known = {finding.name for finding in self.found}
        self.found = findings([*self._first, *self._last])
        self.fresh = [finding for finding in self.found if finding.name not in known]

    @property
    def metrics(self) -> dict[str, float]:
        """`alarm/NAME`: 1 for each finding."""
        return {f"alarm/{finding.name}": 1.0 for finding in self.found}

    def _keep(self, row: Mapping[str, Any]) -> None:
        # Names are built again at every step, and have more bytes than their numbers.
        kept = {sys.intern(name): value for name, value in row.items()}
        if len(self._first) < FIRST:
            self._first.append(kept)
        else:
            self._last.append(kept)
