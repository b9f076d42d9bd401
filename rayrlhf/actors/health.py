"""What is known of one process, and what follows from it: a pure state machine that owns no handle, clock or thread.

    healthy --missed ping--> suspect --deadline--> down --retry due--> rebuilding --built--> stale --weights--> healthy

Every change is a value: `advance` takes what was known and one event and returns what is known now. A process that must not
serve before it has the current weights stays `stale` until `Synced`; one that carries none goes straight to `healthy`.
Rebuilds are bounded: after `RetryPolicy.attempts` in a row without a settled step the process is `abandoned`.
"""

from dataclasses import dataclass, replace
from typing import Literal

State = Literal["healthy", "suspect", "down", "rebuilding", "stale", "abandoned"]
LONGEST_BACKOFF = 60.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how soon. Seconds throughout; see `rayrlhf.config.runtime`."""

    attempts: int = 3
    backoff: float = 1.0
    ping_deadline: float = 30.0

    def delay(self, attempt: int) -> float:
        """Wait before rebuild number `attempt` in a row (1 is the first, which is at once)."""
        return 0.0 if attempt <= 1 else min(self.backoff * 2.0 ** (attempt - 2), LONGEST_BACKOFF)


@dataclass(frozen=True, slots=True)
class Health:
    """What is known of a process.

    Attributes:
        state: see the module.
        since: when the state began, on the clock of the events.
        attempts: rebuilds in a row without a settled step in between.
        retry_at: when a process that is down may be rebuilt.
        reason: why it is down or suspect; empty for a healthy one.
    """

    state: State = "healthy"
    since: float = 0.0
    attempts: int = 0
    retry_at: float = 0.0
    reason: str = ""

    @property
    def serves(self) -> bool:
        """Whether work may be given to it."""
        return self.state in ("healthy", "suspect")

    def is_due(self, now: float) -> bool:
        """Whether a rebuild should start."""
        return self.state == "down" and now >= self.retry_at


@dataclass(frozen=True, slots=True)
class Pong:
    """It answered a ping."""


@dataclass(frozen=True, slots=True)
class Silent:
    """A ping has been unanswered for `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Lost:
    """Ray, a deadline or a peer says that it is gone."""

    reason: str


@dataclass(frozen=True, slots=True)
class Started:
    """A rebuild began."""


@dataclass(frozen=True, slots=True)
class Built:
    """The rebuilt process has its model; `current` says whether the start weights are the ones it must serve."""

    current: bool = False


@dataclass(frozen=True, slots=True)
class Synced:
    """It has the current weights."""


@dataclass(frozen=True, slots=True)
class StepCompleted:
    """A step was completed with everybody in place: earlier rebuilds no longer count."""


Event = Pong | Silent | Lost | Started | Built | Synced | StepCompleted


def advance(health: Health, event: Event, now: float, retry: RetryPolicy) -> Health:
    """What is known after `event`, seen at `now`. An event that makes no sense in a state changes nothing."""
    state = health.state
    match event:
        case Lost(reason) if state in ("healthy", "suspect", "stale", "rebuilding"):
            return _lost(health, reason, now, retry)
        case Silent(seconds) if state in ("healthy", "suspect", "stale") and seconds >= retry.ping_deadline:
            return _lost(health, f"no answer to a ping for {seconds:.0f} s", now, retry)
        case Silent(seconds) if state == "healthy":
            return replace(health, state="suspect", since=now, reason=f"no answer to a ping for {seconds:.0f} s")
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
