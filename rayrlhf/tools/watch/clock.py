"""A clock that can be moved on: for showing steps that were taken before anybody watched, in the time they took."""

import time
from collections.abc import Callable


class ReplayClock:
    """Steady seconds, plus what was skipped."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._skipped = 0.0

    def __call__(self) -> float:
        """Return seconds."""
        return self._clock() + self._skipped

    def skip(self, seconds: float) -> None:
        """Move on by some seconds."""
        self._skipped += max(0.0, seconds)
