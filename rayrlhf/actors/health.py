"""Health of one process as a pure state machine, without handles, clocks or threads.

    healthy --missed ping--> suspect --deadline--> down --retry due--> rebuilding --built--> stale --weights--> healthy

`advance` takes the health and one event and returns the new health. A process that must not serve before it has the current
weights stays `stale` until `Synced`; one without weights of the policy goes straight to `healthy`. Rebuilds are bounded: after
`RetryPolicy.attempts` in a row without a completed step the process is `abandoned`.
"""

from dataclasses import dataclass, replace
from typing import Literal

State = Literal["healthy", "suspect", "down", "rebuilding", "stale", "abandoned"]
MAX_BACKOFF = 60.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounds of rebuilding, in seconds; see `rayrlhf.config.runtime`."""

    attempts: int = 3
    backoff: float = 1.0
    ping_deadline: float = 30.0

    def delay(self, attempt: int) -> float:
        """Return the wait before rebuild number `attempt` in a row; the first has none."""
        return 0.0 if attempt <= 1 else min(self.backoff * 2.0 ** (attempt - 2), MAX_BACKOFF)


@dataclass(frozen=True, slots=True)
class Health:
    """Health of one process.

    Attributes:
        state: see the module.
        since: start of the state, on the clock of the events.
        attempts: rebuilds in a row without a completed step in between.
        retry_at: earliest time of a rebuild.
        reason: cause of `down` or `suspect`; empty for a healthy process.
    """

    state: State = "healthy"
    since: float = 0.0
    attempts: int = 0
    retry_at: float = 0.0
    reason: str = ""

    @property
    def serves(self) -> bool:
        """Return True if the process accepts work."""
        return self.state in ("healthy", "suspect")

    def is_due(self, now: float) -> bool:
        """Return True if a rebuild should start."""
        return self.state == "down" and now >= self.retry_at


@dataclass(frozen=True, slots=True)
class Pong:
    """The process responded to a ping."""


@dataclass(frozen=True, slots=True)
class Silent:
    """A ping has had no response for `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Lost:
    """The process is gone, as reported by Ray, a deadline or a peer."""

    reason: str


@dataclass(frozen=True, slots=True)
class Started:
    """A rebuild began."""


@dataclass(frozen=True, slots=True)
class Built:
    """The rebuilt process has its model; `current` if its start weights are the current ones."""

    current: bool = False


@dataclass(frozen=True, slots=True)
class Synced:
    """The process has the current weights."""


@dataclass(frozen=True, slots=True)
class StepCompleted:
    """A step was completed, so earlier rebuilds no longer count."""


Event = Pong | Silent | Lost | Started | Built | Synced | StepCompleted


def advance(health: Health, event: Event, now: float, retry: RetryPolicy) -> Health:
    """Return the health after `event` at time `now`; events that do not apply change nothing."""
    state = health.state
    match event:
        case Lost(reason) if state in ("healthy", "suspect", "stale", "rebuilding"):
            return _lost(health, reason, now, retry)
        case Silent(seconds) if state in ("healthy", "suspect", "stale") and seconds >= retry.ping_deadline:
            return _lost(health, f"no response to a ping for {seconds:.0f} s", now, retry)
        case Silent(seconds) if state == "healthy":
            return replace(health, state="suspect", since=now, reason=f"no response to a ping for {seconds:.0f} s")
        case Pong() if state == "suspect":
            return replace(health, state="healthy", since=now, reason="")
        case Started() if state == "down":
            return replace(health, state="rebuilding", since=now)
        case Built(current) if state == "rebuilding":
            return replace(health, state="healthy" if current else "stale", since=now, reason="")
        case Synced() if state == "stale":
            return replace(health, state="healthy", since=now)
        case StepCompleted() if state == "healthy":
            return replace(health, attempts=0)
    return health


def _lost(health: Health, reason: str, now: float, retry: RetryPolicy) -> Health:
    attempts = health.attempts + 1
    if attempts > retry.attempts:
        return replace(health, state="abandoned", since=now, attempts=attempts, reason=reason)
    return Health("down", now, attempts, now + retry.delay(attempts), reason)
