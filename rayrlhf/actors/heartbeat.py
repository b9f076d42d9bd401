"""Heartbeat monitor: a thread that pings every actor and kills those that hang.

Ray reports a process that is gone at the next call. It does not report one that hangs (stopped, swapping, deadlocked with the
interpreter's lock held), and every wait on it would last until its deadline. Killing it turns the second case into the first,
so that all waits handle one kind of failure.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayError

from rayrlhf.actors.footprint import Footprint
from rayrlhf.actors.health import Health, Pong, RetryPolicy, Silent, advance
from rayrlhf.actors.remote import Handle, Ref, remote_call
from rayrlhf.actors.waiting import describe_location, forget, pending_call, record_location
from rayrlhf.actors.worker import ProcessLocation, Worker


@dataclass
class _Monitored:
    handle: Handle[Worker]
    health: Health = field(default_factory=Health)
    location: ProcessLocation | None = None
    ping: Ref[ProcessLocation] | None = None
    sent: float = 0.0


class HeartbeatMonitor:
    """Pings in the background between `__enter__` and `__exit__`.

    Args:
        retry: its `ping_deadline` is the age of a ping at which an actor counts as hung.
        every: seconds between two pings of one actor.
        on_kill: receives (actor name, line) of every actor that was killed.
    """

    def __init__(self, retry: RetryPolicy, every: float, on_kill: Callable[[str, str], None]) -> None:
        self._retry = retry
        self._every = every
        self._on_kill = on_kill
        self._monitored: dict[str, _Monitored] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rayrlhf-heartbeat", daemon=True)

    def __enter__(self) -> "HeartbeatMonitor":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join(timeout=10)
        for name in self._monitored:
            forget(name)

    def add(self, name: str, handle: Handle[Worker]) -> None:
        """Start pinging a built actor; it replaces an earlier one of the same name."""
        forget(name)
        with self._lock:
            self._monitored[name] = _Monitored(handle)

    def remove(self, name: str) -> None:
        """Stop pinging an actor."""
        with self._lock:
            self._monitored.pop(name, None)
        forget(name)

    def footprints(self) -> dict[str, Footprint]:
        """Return the peak memory of each actor as of its last ping."""
        with self._lock:
            return {name: actor.location.footprint for name, actor in self._monitored.items() if actor.location}

    def _run(self) -> None:
        while not self._end.wait(min(self._every, self._retry.ping_deadline) / 4):
            with self._lock:
                monitored = dict(self._monitored)
            for name, actor in monitored.items():
                self._check(name, actor)

    def _check(self, name: str, actor: _Monitored) -> None:
        """Send a due ping, read a finished one, kill a hung actor."""
        now = time.monotonic()
        try:
            if actor.ping is None:
                if now - actor.sent >= self._every:
                    actor.sent, actor.ping = now, remote_call(actor.handle, Worker.ping)
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
            self._forget(name, actor)  # The process is gone; the next call to it fails.
            return
        actor.health = advance(actor.health, Silent(now - actor.sent), now, self._retry)
        if not actor.health.serves:
            self._kill_hung(name, actor)

    def _kill_hung(self, name: str, actor: _Monitored) -> None:
        call = pending_call(name)
        waiting = f"the run waits for {call}; " if call else ""
        self._on_kill(name, f"{describe_location(name)}: {actor.health.reason}; {waiting}the process is killed")
        self._forget(name, actor)
        ray.kill(actor.handle)

    def _forget(self, name: str, actor: _Monitored) -> None:
        with self._lock:
            if self._monitored.get(name) is actor:
                del self._monitored[name]
        forget(name)
