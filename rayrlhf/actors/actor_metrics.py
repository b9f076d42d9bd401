"""Prometheus metrics of every actor: calls, busy seconds, peak memory and finished tokens.

Ray exports them from the actor's node, so they continue while the driver waits and end with the actor. The run's metrics are in
`ppo/cluster_metrics.py`.
"""

import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import ray
from ray.util.metrics import Counter, Gauge

CALLS, BUSY, MEMORY, TOKENS, UNFINISHED = (
    "rayrlhf_actor_calls",
    "rayrlhf_actor_busy_seconds",
    "rayrlhf_actor_peak_memory_bytes",
    "rayrlhf_rollout_tokens",
    "rayrlhf_rollout_unfinished",
)
COUNTERS: Mapping[str, str] = {
    CALLS: "Calls that an actor has served, by kind of call.",
    BUSY: "Seconds that an actor has worked on calls, by kind of call; its rate is the share of time it is busy.",
    TOKENS: "Response tokens that a replica has finished.",
}
"""Name of a counter -> its description. Prometheus sees `ray_NAME_total`."""
GAUGES: Mapping[str, str] = {
    MEMORY: "Peak resident memory of an actor's process, bytes.",
    UNFINISHED: "Responses that a replica has not finished.",
}
"""Name of a gauge -> its description. Prometheus sees `ray_NAME`."""
CALL_LABELS = (CALLS, BUSY)
LABELS = ("run", "role", "rank")


class ActorMetrics:
    """Counters and gauges of one actor; without a name `RUN/ROLE/RANK` it has none."""

    def __init__(self, name: str) -> None:
        """Register the metrics; must run in the actor's process."""
        parts = name.rsplit("/", 2)
        self._tags = dict(zip(LABELS, parts, strict=True)) if len(parts) == len(LABELS) else None
        keys = {name: (*LABELS, "call") if name in CALL_LABELS else LABELS for name in (*COUNTERS, *GAUGES)}
        if self._tags is not None:
            self._counters = {name: Counter(name, text, tag_keys=keys[name]) for name, text in COUNTERS.items()}
            self._gauges = {name: Gauge(name, text, tag_keys=keys[name]) for name, text in GAUGES.items()}

    @classmethod
    def of_this_actor(cls) -> "ActorMetrics":
        """Return the metrics of this process's actor; without an actor they have no effect."""
        return cls((ray.get_runtime_context().get_actor_name() or "") if ray.is_initialized() else "")

    def served(self, call: str, seconds: float) -> None:
        """Count one call."""
        if self._tags is not None:
            tags = {**self._tags, "call": call}
            self._counters[CALLS].inc(tags=tags)
            if seconds > 0:
                self._counters[BUSY].inc(seconds, tags=tags)

    def sampled(self, tokens: int, unfinished: int) -> None:
        """Count finished tokens, and set the number of unfinished responses."""
        if self._tags is not None:
            if tokens:
                self._counters[TOKENS].inc(tokens, tags=self._tags)
            self._gauges[UNFINISHED].set(unfinished, tags=self._tags)

    def peak_memory(self, size: int) -> None:
        """Set the process's peak resident memory in bytes."""
        if self._tags is not None:
            self._gauges[MEMORY].set(size, tags=self._tags)


class Measured(Protocol):
    """An object with metrics."""

    @property
    def actor_metrics(self) -> ActorMetrics:
        """Metrics, created at first use."""


Owner = TypeVar("Owner", bound=Measured)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def measured(call: Callable[Concatenate[Owner, Arguments], Result]) -> Callable[Concatenate[Owner, Arguments], Result]:
    """Count a method's calls and seconds, also of calls that fail."""

    @wraps(call)
    def timed(self: Owner, /, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        begin = time.monotonic()
        try:
            return call(self, *arguments, **named)
        finally:
            self.actor_metrics.served(call.__name__, time.monotonic() - begin)

    return timed
