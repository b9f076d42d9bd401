"""Heartbeat monitor: a thread that pings every actor and kills those that hang.

Ray reports a dead process at the next call. It does not report a process that hangs (stopped, swapping, deadlocked with the
interpreter's lock held), and every wait on it would last until its deadline. Killing the process turns a hang into a loss, so
that all waits handle one kind of failure.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError

from rayrlhf.actors.footprint import Footprint
from rayrlhf.actors.health import Health, Pong, RetryPolicy, Silent, advance
from rayrlhf.actors.rebuild import RecoveryListener
from rayrlhf.actors.remote import Handle, Ref, remote_call
from rayrlhf.actors.waiting import describe_location, forget, pending_call, record_location
from rayrlhf.actors.worker import Beat, ProcessLocation, Worker
from rayrlhf.config.section import GIB
from rayrlhf.observe.stacks import own_stacks, process_stacks

LAST_SECONDS = 5.0
"""Longest wait for the output of user code at the end, and for stacks."""


@dataclass
class _Monitored:
    handle: Handle[Worker]
    retry: RetryPolicy
    health: Health = field(default_factory=Health)
    location: ProcessLocation | None = None
    ping: Ref[Beat] | None = None
    sent: float = 0.0
    heard: float = 0.0
    named: bool = False


class HeartbeatMonitor:
    """Pings in the background between `__enter__` and `__exit__`.

    Args:
        retry: its `ping_deadline` is the age of a ping at which an actor counts as hung.
        every: seconds between two pings of one actor.
        listener: receives `hung` for every actor that was killed, and `silent` for one that loads and has not responded for
            `ping_deadline`.
        on_output: receives (actor name, lines) that user code wrote.
        on_stacks: receives (actor name, stacks) of an actor of this machine before it is killed.
    """

    def __init__(
        self,
        retry: RetryPolicy,
        every: float,
        listener: RecoveryListener = lambda *_: None,
        on_output: Callable[[str, Sequence[str]], None] = lambda name, lines: None,
        on_stacks: Callable[[str, str], None] = lambda name, text: None,
    ) -> None:
        self._retry = retry
        self._every = every
        self._listener = listener
        self._on_output, self._on_stacks = on_output, on_stacks
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
        self._read_last_output()
        for name in self._monitored:
            forget(name)

    def add(self, name: str, handle: Handle[Worker], loading_seconds: float = 0.0) -> None:
        """Start pinging an actor; it replaces an earlier one of the same name.

        Imports and compilation keep a process that loads from responding for long, so it counts as lost only after half of the
        deadline of its load.

        Args:
            loading_seconds: that deadline; 0 for an actor that has its model.
        """
        forget(name)
        patience = max(self._retry.ping_deadline, loading_seconds / 2)
        with self._lock:
            self._monitored[name] = _Monitored(handle, replace(self._retry, ping_deadline=patience))

    def remove(self, name: str) -> None:
        """Stop pinging an actor."""
        with self._lock:
            self._monitored.pop(name, None)
        forget(name)

    def footprints(self) -> dict[str, Footprint]:
        """Return the peak memory of each actor as of its last ping."""
        with self._lock:
            return {name: actor.location.footprint for name, actor in self._monitored.items() if actor.location}

    def vitals(self) -> dict[str, dict[str, Any]]:
        """Return process, node, age of the heartbeat, peak memory and open call of each actor."""
        now, found = time.monotonic(), {}
        with self._lock:
            monitored = dict(self._monitored)
        for name, actor in monitored.items():
            row: dict[str, Any] = {"state": actor.health.state, "call": pending_call(name)}
            if actor.location:
                row |= {"pid": actor.location.pid, "node": actor.location.address, "age": round(now - actor.heard, 1)}
                row["peak_gib"] = round(actor.location.footprint.resident / GIB, 3)
            found[name] = row
        return found

    def stacks(self) -> dict[str, str]:
        """Return the stacks of the driver and of all actors.

        Those of one that does not respond are read from outside, if it is on this machine.
        """
        with self._lock:
            monitored = dict(self._monitored)
        found, sent = {"driver": own_stacks()}, {}
        for name, actor in monitored.items():
            with suppress(RayError):
                sent[name] = remote_call(actor.handle, Worker.stacks)
        ready = ray.wait([*sent.values()], num_returns=len(sent), timeout=LAST_SECONDS)[0] if sent else []
        for name, actor in monitored.items():
            with suppress(RayError):
                found[name] = ray.get(sent[name]) if sent.get(name) in ready else _outside(actor)
        return {name: text for name, text in found.items() if text}

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
                    actor.sent, actor.ping = now, remote_call(actor.handle, Worker.beat, False)
                return
            if ray.wait([actor.ping], timeout=0)[0]:
                ping, actor.ping = actor.ping, None
                beat = ray.get(ping)
                actor.location, actor.heard = beat.location, now
                self._pass_on(name, beat)
                with self._lock:
                    if self._monitored.get(name) is actor:
                        record_location(name, actor.location)
                actor.health = advance(actor.health, Pong(), now, actor.retry)
                return
        except RayError:
            self._forget(name, actor)  # The process is gone; the next call to it fails.
            return
        actor.health = advance(actor.health, Silent(now - actor.sent), now, actor.retry)
        if not actor.health.serves:
            self._kill_hung(name, actor)
        elif now - actor.sent >= self._retry.ping_deadline and not actor.named:
            actor.named = True
            end = f"it counts as lost after {actor.retry.ping_deadline:.0f} s"
            self._listener("silent", name, f"{describe_location(name)}: {actor.health.reason}; {end}", 0.0)

    def _read_last_output(self) -> None:
        """Pass on the output since the last pings."""
        sent: list[tuple[str, Ref[Beat]]] = []
        with suppress(RayError):
            for name, actor in self._monitored.items():
                sent += [(name, actor.ping)] if actor.ping is not None else []
                sent.append((name, remote_call(actor.handle, Worker.beat, True)))
        refs = [ref for _, ref in sent]
        ready = ray.wait(refs, num_returns=len(refs), timeout=LAST_SECONDS)[0] if refs else []
        for name, ref in sent:
            with suppress(RayError):
                if ref in ready:
                    self._pass_on(name, ray.get(ref))

    def _pass_on(self, name: str, beat: Beat) -> None:
        if beat.output:
            self._on_output(name, beat.output)

    def _kill_hung(self, name: str, actor: _Monitored) -> None:
        call = pending_call(name)
        waiting = f"the run waits for {call}; " if call else ""
        line = f"{describe_location(name)}: {actor.health.reason}; {waiting}the process is killed"
        self._listener("hung", name, line, 0.0)
        text = _outside(actor)
        if text:
            self._on_stacks(name, text)
        self._forget(name, actor)
        ray.kill(actor.handle)

    def _forget(self, name: str, actor: _Monitored) -> None:
        with self._lock:
            if self._monitored.get(name) is actor:
                del self._monitored[name]
        forget(name)


def _outside(actor: _Monitored) -> str:
    """Return the stacks of an actor's process, empty if it is on another machine."""
    here = actor.location is not None and actor.location.address == ray.util.get_node_ip_address()
    return process_stacks(actor.location.pid) if here and actor.location is not None else ""
