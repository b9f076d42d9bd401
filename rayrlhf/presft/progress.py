"""How far a stage is, as a plain line now and then: rows done, rows a second, time to go."""

import time
from collections.abc import Callable
from typing import Protocol

from rayrlhf.observe.progress import duration


class Noted(Protocol):
    """Something that prints a line."""

    def note(self, text: str) -> None:
        """Print a line that stays."""
        ...


class PartProgress:
    """Says how a stage gets on, at most every few seconds and at its end."""

    def __init__(self, view: Noted, *, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare; `seconds` lie between two lines, `clock` is steady."""
        self._view, self._seconds, self._clock = view, seconds, clock

    def note(self, text: str) -> None:
        """Print a line."""
        self._view.note(text)

    def rows(self, text: str, total: int) -> Callable[[int], None]:
        """Return what a stage tells of each part that is done."""
        started = last = self._clock()
        count = 0

        def done(rows: int) -> None:
            nonlocal count, last
            count += rows
            now = self._clock()
            if count < total and now - last < self._seconds:
                return
            last = now
            speed = count / max(now - started, 1e-9)
            left = f", {duration((total - count) / speed)} left" if count < total else f" in {duration(now - started)}"
            self._view.note(f"{text}: {count} of {total} rows, {speed:.0f} rows/s{left}")

        return done
