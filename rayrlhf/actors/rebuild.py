"""Rebuilds of a lost process or process group, with back-off and bounded attempts."""

import time
from collections.abc import Callable

from rayrlhf.actors.health import Built, Event, Health, Lost, RetryPolicy, Started, StepCompleted, advance
from rayrlhf.errors import ActorLostError, DeviceMemoryError

RecoveryListener = Callable[[str, str, str, float], None]
"""Receives losses and recoveries: (event, actor, reason, seconds since the loss)."""


class Rebuilder:
    """Health of one process or process group, and its blocking rebuild.

    `ReplicaPool` advances the same state machine without blocking.
    """

    def __init__(self, retry: RetryPolicy) -> None:
        self._retry = retry
        self._health = Health()

    def rebuild_with_backoff(self, error: ActorLostError, rebuild: Callable[[ActorLostError], None]) -> None:
        """Call `rebuild` until it succeeds, with growing delays.

        Args:
            rebuild: one attempt, given the latest loss; blocks until the new process is ready. A lack of device memory counts
                as a loss, because others may give memory back before the next attempt.

        Raises:
            ActorLostError: too many losses without a completed step in between.
        """
        name = error.actor
        while True:
            self._advance(Lost(str(error)))
            if self._health.state == "abandoned":
                raise ActorLostError(f"{error}; given up after {self._retry.attempts} rebuilds in a row", name)
            time.sleep(max(self._health.retry_at - time.monotonic(), 0.0))
            self._advance(Started())
            try:
                rebuild(error)
                break
            except ActorLostError as again:
                error = again
            except DeviceMemoryError as lack:
                error = ActorLostError(str(lack), name)
        self._advance(Built(current=True))

    def step_completed(self) -> None:
        """Reset the count of attempts of a healthy process."""
        self._advance(StepCompleted())

    def _advance(self, event: Event) -> None:
        self._health = advance(self._health, event, time.monotonic(), self._retry)
