"""Checks, their signs, and findings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rayrlhf.observe.diagnostics.history import History

Severity = Literal["warning", "alarm"]
"""A warning may be intended; after an alarm further steps are rarely worth their time (`observe.on_alarm`)."""


class Sign(NamedTuple):
    """Evidence of a problem, found by a check.

    Attributes:
        since: first step of the segment that shows it.
        evidence: the numbers, in a sentence without a period.
    """

    since: int
    evidence: str


@dataclass(frozen=True, slots=True)
class Check:
    """Check for one common training problem.

    Attributes:
        name: name of the finding, and of its metric `alarm/NAME`.
        severity: see `Severity`.
        remedy: suggestions, the most likely first.
        look: returns a sign while the newest steps show the problem, else None.
    """

    name: str
    severity: Severity
    remedy: str
    look: Callable[[History], Sign | None]


def check(severity: Severity, remedy: str) -> Callable[[Callable[[History], Sign | None]], Check]:
    """Make a check of a function, which has its name."""
    return lambda look: Check(look.__name__, severity, remedy, look)


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of a check at the newest step of a history."""

    name: str
    severity: Severity
    since_step: int
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.name.replace('_', ' ')} since step {self.since_step}: {self.evidence}. {self.remedy}"
