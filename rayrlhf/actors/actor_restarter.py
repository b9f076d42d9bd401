"""Rebuilding reward and reference processes, which keep no state: a new one is as good, and its calls are simply repeated."""

import time
from collections.abc import Callable
from typing import Any

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.health import Built, Event, Health, Lost, RetryPolicy, Started, StepCompleted, advance
from rayrlhf.actors.heartbeat import HeartbeatMonitor
from rayrlhf.actors.placement import Role
from rayrlhf.actors.waiting import wait_all
from rayrlhf.errors import ActorLostError

LossNote = Callable[[str, str, str, float], None]
"""Told of losses and recoveries: (event, actor, reason, seconds since the loss)."""


class ActorRestarter:
    """Replaces lost processes, a bounded number of times in a row.

    Args:
        actor_groups: the running actors.
        retry: bounds of rebuilding.
        build_seconds: longest time a rebuild may take.
        watch: pings the processes; None for no pings.
        note: see `LossNote`.
        enabled: False raises at the first loss.
    """

    def __init__(
        self,
        actor_groups: ActorGroups,
        retry: RetryPolicy,
        build_seconds: float,
        monitor: HeartbeatMonitor | None = None,
        note: LossNote = lambda *_: None,
        enabled: bool = True,
    ) -> None:
        self._actor_groups = actor_groups
        self._retry = retry
        self._build_seconds = build_seconds
        self._watch = monitor
        self._note = note
        self._enabled = enabled
        self._health: dict[str, Health] = {}

    def restart_lost(self, role: Role, rank: int, lost: Any, error: ActorLostError) -> Any:
        """The handle of a living process in the place of `lost`; returns when it has its model.

        Several calls may find the same process gone: only the first of them replaces it.

        Raises:
            ActorLostError: recovery is switched off, or the process was lost too often in a row.
        """
        if not self._enabled:
            raise error
        group = self._actor_groups[role]
        if group.handles[rank] is not lost:
            return group.handles[rank]
        name, began = group.names[rank], time.monotonic()
        self._note("lost", name, str(error), 0.0)
        if self._watch:
            self._watch.remove(name)
        self._event(name, Lost(str(error)))
        while True:
            health = self._health[name]
            if health.state == "abandoned":
                raise ActorLostError(f"{error}; given up after {self._retry.attempts} rebuilds in a row", name)
            time.sleep(max(health.retry_at - time.monotonic(), 0.0))
            self._event(name, Started())
            try:
                wait_all({name: self._actor_groups.restart(role, rank)}, "rebuild", self._build_seconds)
                break
            except ActorLostError as again:
                self._event(name, Lost(str(again)))
        self._event(name, Built(current=True))
        handle = self._actor_groups[role].handles[rank]
        if self._watch:
            self._watch.add(name, handle)
        self._note("recovered", name, "", time.monotonic() - began)
        return handle

    def step_completed(self) -> None:
        """Take note that a step was completed."""
        for name in self._health:
            self._event(name, StepCompleted())

    def _event(self, name: str, event: Event) -> None:
        self._health[name] = advance(self._health.get(name, Health()), event, time.monotonic(), self._retry)
