"""Which of several servers to ask: the least asked one that did not just fail several times in a row.

A circuit breaker has three states. Closed: calls go through. Open, after `failures_to_open` failures in a row: no call for
`open_seconds`. Half open, when that time is over: one call may try; its success closes the breaker, its failure opens it anew.
All of it is pure: the caller says what time it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Breaker:
    """The state of one server.

    Attributes:
        failures_to_open: failures in a row after which the server is left alone.
        open_seconds: how long it is left alone.
        failures: failures in a row until now.
        opened_at: when it opened, in the caller's seconds; None while closed.
        in_flight: calls that have not ended.
        asked: calls ever begun.
    """

    failures_to_open: int = 3
    open_seconds: float = 10.0
    failures: int = 0
    opened_at: float | None = None
    in_flight: int = 0
    asked: int = 0

    def admits(self, now: float) -> bool:
        """Whether a call may begin at `now` (seconds of any steady clock)."""
        if self.opened_at is None:
            return True
        return now - self.opened_at >= self.open_seconds and self.in_flight == 0

    def begin(self) -> None:
        """Count a call as begun."""
        self.in_flight += 1
        self.asked += 1

    def succeed(self) -> None:
        """End a call with an answer that could be used."""
        self.in_flight -= 1
        self.failures = 0
        self.opened_at = None

    def fail(self, now: float) -> None:
        """End a call without one."""
        self.in_flight -= 1
        self.failures += 1
        if self.opened_at is not None or self.failures >= self.failures_to_open:
            self.opened_at = now

    def abandon(self) -> None:
        """End a call that was cancelled, which says nothing of the server."""
        self.in_flight -= 1


def choose(breakers: Sequence[Breaker], now: float) -> int | None:
    """Return the index of the server to ask: of those that admit a call the least busy, then least asked; None for none."""
    admitted = [index for index, breaker in enumerate(breakers) if breaker.admits(now)]
    return min(admitted, key=lambda index: (breakers[index].in_flight, breakers[index].asked, index), default=None)
