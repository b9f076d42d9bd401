"""A thread that pings every actor beside its work, and ends those that stopped answering.

A process that is gone is reported by Ray at the next call; one that hangs (stopped, swapping, deadlocked with the
interpreter's lock held) is not, and every wait on it would last until its deadline. Ending it turns the second case into the
first, so that all waits deal with one kind of failure.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from rayrlhf.actors.footprint import Footprint
from rayrlhf.actors.health import Health, Pong, RetryPolicy, Silent, advance
from rayrlhf.actors.node_registry import describe_location, forget, record_location
from rayrlhf.actors.pending_calls import pending_call
from rayrlhf.actors.worker import ProcessLocation


@dataclass
class _Monitored:
    handle: Any
    health: Health = field(default_factory=Health)
    location: ProcessLocation | None = None
    ping: ray.ObjectRef | None = None
    sent: float = 0.0


class HeartbeatMonitor:
    """Pings in the background between `__enter__` and `__exit__`.

    Args:
        retry: its `ping_deadline` is when an actor counts as hung.
        every: seconds between the pings of one actor.
        note: told (actor name, line) of every actor that was ended.
    """

    def __init__(self, retry: RetryPolicy, every: float, note: Callable[[str, str], None]) -> None:
        self._retry = retry
        self._every = every
        self._note = note
        self._monitored: dict[str, _Monitored] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rayrlhf-watch", daemon=True)

    def __enter__(self) -> "HeartbeatMonitor":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join(timeout=10)
        for name in self._monitored:
            forget(name)

    def add(self, name: str, handle: Any) -> None:
        """Ping a built actor from now on, in place of an earlier one of the same name."""
        forget(name)
        with self._lock:
            self._monitored[name] = _Monitored(handle)

    def remove(self, name: str) -> None:
        """HeartbeatMonitor an actor no more."""
        with self._lock:
            self._monitored.pop(name, None)
        forget(name)

    def footprints(self) -> dict[str, Footprint]:
        """What memory each actor took at most, as of its last answer."""
        with self._lock:
            return {name: actor.location.footprint for name, actor in self._monitored.items() if actor.location}

    def _run(self) -> None:
        while not self._end.wait(min(self._every, self._retry.ping_deadline) / 4):
            with self._lock:
                monitored = dict(self._monitored)
            for name, actor in monitored.items():
                self._check(name, actor)

    def _check(self, name: str, actor: _Monitored) -> None:
        """Send a ping that is due, read one that is back, end an actor that let one wait too long."""
        now = time.monotonic()
        try:
            if actor.ping is None:
                if now - actor.sent >= self._every:
                    actor.sent, actor.ping = now, actor.handle.ping.remote()
                return
            if ray.wait([actor.ping], timeout=0)[0]:
                ping, actor.ping = actor.ping, None
                actor.location = ray.get(ping)
                with self._lock:
                    if self._monitored.get(name) is actor:
                        record_location(name, actor.location)
                actor.health = advance(actor.health, Pong(), now, self._retry)
                return
        except RayError:
            self._forget(name, actor)  # it is gone, and whoever calls it next will be told so
            return
        actor.health = advance(actor.health, Silent(now - actor.sent), now, self._retry)
        if not actor.health.serves:
            self._kill_hung(name, actor)

    def _kill_hung(self, name: str, actor: _Monitored) -> None:
        call = pending_call(name)
        owed = f"the run waits for {call}; " if call else ""
        self._note(name, f"{describe_location(name)}: {actor.health.reason}; {owed}the process is ended")
        self._forget(name, actor)
        ray.kill(actor.handle)

    def _forget(self, name: str, actor: _Monitored) -> None:
        with self._lock:
            if self._monitored.get(name) is actor:
                del self._monitored[name]
        forget(name)
