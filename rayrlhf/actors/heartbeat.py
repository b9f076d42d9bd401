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
from rayrlhf.actors.node_registry import forget, located, seen
from rayrlhf.actors.pending_calls import waited_for
from rayrlhf.actors.worker import Place


@dataclass
class _Watched:
    handle: Any
    health: Health = field(default_factory=Health)
    place: Place | None = None
    ping: ray.ObjectRef | None = None
    sent: float = 0.0


class Watch:
    """Pings in the background between `__enter__` and `__exit__`.

    Args:
        policy: its `ping_deadline` is when an actor counts as hung.
        every: seconds between the pings of one actor.
        note: told (actor name, line) of every actor that was ended.
    """

    def __init__(self, policy: RetryPolicy, every: float, note: Callable[[str, str], None]) -> None:
        self._policy = policy
        self._every = every
        self._note = note
        self._watched: dict[str, _Watched] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rayrlhf-watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join(timeout=10)
        for name in self._watched:
            forget(name)

    def add(self, name: str, handle: Any) -> None:
        """Watch an actor from now on, in place of an earlier one of the same name. It has been built and answers pings."""
        forget(name)
        with self._lock:
            self._watched[name] = _Watched(handle)

    def remove(self, name: str) -> None:
        """Watch an actor no more."""
        with self._lock:
            self._watched.pop(name, None)
        forget(name)

    def footprints(self) -> dict[str, Footprint]:
        """What memory each actor took at most, as of its last answer."""
        with self._lock:
            return {name: actor.place.footprint for name, actor in self._watched.items() if actor.place}

    def _run(self) -> None:
        while not self._end.wait(min(self._every, self._policy.ping_deadline) / 4):
            with self._lock:
                watched = dict(self._watched)
            for name, actor in watched.items():
                self._look_at(name, actor)

    def _look_at(self, name: str, actor: _Watched) -> None:
        """Send a ping that is due, read one that is back, end an actor that let one wait too long."""
        now = time.monotonic()
        try:
            if actor.ping is None:
                if now - actor.sent >= self._every:
                    actor.sent, actor.ping = now, actor.handle.ping.remote()
                return
            if ray.wait([actor.ping], timeout=0)[0]:
                ping, actor.ping = actor.ping, None
                actor.place = ray.get(ping)
                with self._lock:
                    if self._watched.get(name) is actor:
                        seen(name, actor.place)
                actor.health = advance(actor.health, Pong(), now, self._policy)
                return
        except RayError:
            self._forget(name, actor)  # it is gone, and whoever calls it next will be told so
            return
        actor.health = advance(actor.health, Silent(now - actor.sent), now, self._policy)
        if not actor.health.serves:
            self._end_hung(name, actor)

    def _end_hung(self, name: str, actor: _Watched) -> None:
        call = waited_for(name)
        owed = f"the run waits for {call}; " if call else ""
        self._note(name, f"{located(name)}: {actor.health.reason}; {owed}the process is ended")
        self._forget(name, actor)
        ray.kill(actor.handle)

    def _forget(self, name: str, actor: _Watched) -> None:
        with self._lock:
            if self._watched.get(name) is actor:
                del self._watched[name]
        forget(name)
