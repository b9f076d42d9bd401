"""A check, the sign that it saw, and what becomes of both: a finding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rayrlhf.observe.diagnostics.history import History

Severity = Literal["warning", "alarm"]
"""A warning may be meant so; after an alarm further steps are rarely worth their time (`observe.on_alarm`)."""


class Sign(NamedTuple):
    """What a check saw.

    Attributes:
        since: first step of the stretch that shows it.
        evidence: the numbers, in a sentence without a full stop.
    """

    since: int
    evidence: str


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that goes wrong in practice.

    Attributes:
        name: of the finding, and of its metric `alarm/NAME`.
        severity: see `Severity`.
        remedy: what to try, the likeliest first.
        look: returns a sign while the newest steps show it, else None.
    """

    name: str
    severity: Severity
    remedy: str
    look: Callable[[History], Sign | None]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found at the newest step of a history."""

    name: str
    severity: Severity
    since_step: int
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.name.replace('_', ' ')} since step {self.since_step}: {self.evidence}. {self.remedy}"
