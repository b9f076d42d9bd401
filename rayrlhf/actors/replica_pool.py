"""The rollout replicas of a run, some of which may be lost, being rebuilt, or without the current weights at any moment.

The pool never blocks on a rebuild: it starts one when it is due and tells, as a reference to wait on beside other work,
when the new process has its model. That process is `stale` until it was given the current weights.
"""

import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.actor_restarter import LossNote
from rayrlhf.actors.health import (
    Built,
    Event,
    Health,
    Lost,
    RetryPolicy,
    Started,
    StepCompleted,
    Synced,
    advance,
)
from rayrlhf.actors.heartbeat import HeartbeatMonitor
from rayrlhf.actors.waiting import fetch, overrun
from rayrlhf.errors import ActorLostError


@dataclass
class Replica:
    """One rollout replica.

    Attributes:
        rank: its number.
        name: `<run>/rollout/<rank>`.
        handle: the process that is there now.
        health: what is known of it.
        building: its `build`, while it is being rebuilt.
    """

    rank: int
    name: str
    handle: Any
    health: Health
    building: ray.ObjectRef | None = None


class ReplicaPool:
    """All replicas of a run.

    Args:
        actor_groups: the running actors.
        retry: bounds of rebuilding.
        watch: pings the replicas; None for no pings.
        minimum: replicas that must serve.
        patience: longest time below the minimum, in seconds.
        note: see `LossNote`.
        enabled: False raises at the first loss.
        build_seconds: longest time a rebuild may take.
    """

    def __init__(
        self,
        actor_groups: ActorGroups,
        retry: RetryPolicy | None = None,
        monitor: HeartbeatMonitor | None = None,
        minimum: int = 1,
        patience: float = 600.0,
        note: LossNote = lambda *_: None,
        enabled: bool = True,
        build_seconds: float = 600.0,
    ) -> None:
        self._actor_groups = actor_groups
        self._retry = retry or RetryPolicy()
        self._watch = monitor
        self._minimum = minimum
        self._patience = patience
        self._note = note
        self._enabled = enabled
        self._build_seconds = build_seconds
        now = time.monotonic()
        group = actor_groups["rollout"]
        self.replicas = [
            Replica(rank, name, handle, Health(since=now))
            for rank, (name, handle) in enumerate(zip(group.names, group.handles, strict=True))
        ]
        self._rooms: dict[str, PlacementGroup] = {}
        self._rooms_asked = 0
        self._joining: set[int] = set()
        self._down_since: dict[int, float] = {}
        self._short_since: float | None = None

    @property
    def serving(self) -> list[Replica]:
        """Replicas that may be given work."""
        return [replica for replica in self.replicas if replica.health.serves]

    @property
    def stale(self) -> list[Replica]:
        """Rebuilt replicas that wait for the current weights."""
        return [replica for replica in self.replicas if replica.health.state == "stale"]

    @property
    def building(self) -> dict[str, ray.ObjectRef]:
        """Builds to wait on beside other work, by actor name."""
        return {replica.name: replica.building for replica in self.replicas if replica.building is not None}

    @property
    def losses(self) -> int:
        """Replicas that are not there at the moment."""
        return len(self.replicas) - len(self.serving)

    def lost(self, replica: Replica, error: Exception) -> None:
        """Take note that a replica is gone, end what is left of it, and start a new one when that is due.

        Raises:
            ActorLostError: recovery is switched off.
        """
        if not self._enabled:
            raise error
        if replica.health.state in ("down", "abandoned"):
            return
        self._event(replica, Lost(str(error)))
        self._down_since.setdefault(replica.rank, time.monotonic())
        replica.building = None
        if self._watch:
            self._watch.remove(replica.name)
        ray.kill(replica.handle)
        self._note("lost", replica.name, str(error), 0.0)
        self.poll_rebuilds()

    def poll_rebuilds(self) -> None:
        """Start rebuilds that are due and look at those that may be done; never waits.

        Raises:
            UserError: a rebuild shows a mistake in the configuration.
            ActorLostError: for too long too few replicas serve.
        """
        now = time.monotonic()
        self._let_in(now)
        for replica in self.replicas:
            if replica.health.is_due(now):
                replica.building = self._actor_groups.restart("rollout", replica.rank)
                replica.handle = self._actor_groups["rollout"].handles[replica.rank]
                self._event(replica, Started())
            elif replica.building is not None and ray.wait([replica.building], timeout=0)[0]:
                self._built(replica)
            elif replica.building is not None and now - replica.health.since > self._build_seconds:
                self.lost(replica, overrun("rebuild", [replica.name], self._build_seconds))
        self._check_enough(now)

    def synced(self, replica: Replica) -> None:
        """Take note that a replica serves the current weights."""
        if replica.health.state == "stale":
            self._event(replica, Synced())
            seconds = time.monotonic() - self._down_since.pop(replica.rank, time.monotonic())
            self._note("joined" if replica.rank in self._joining else "recovered", replica.name, "", seconds)
            self._joining.discard(replica.rank)

    def scale(self, wanted: int) -> None:
        """Let replicas join or leave until there are `wanted`; call it between steps.

        What those that leave still owe is asked of the others.

        Those that join ask the cluster for room and come when it has some, be it on a node that is yet to appear.
        """
        while len(self.replicas) + len(self._rooms) > wanted:
            if self._rooms:
                self._actor_groups.release_placement_group(self._rooms.popitem()[0])
                continue
            replica = self.replicas.pop()
            if self._watch:
                self._watch.remove(replica.name)
            self._down_since.pop(replica.rank, None)
            self._joining.discard(replica.rank)
            self._actor_groups.remove_replica()
            self._note("left", replica.name, f"{wanted} replicas are wanted", 0.0)
        while len(self.replicas) + len(self._rooms) < wanted:
            self._rooms_asked += 1
            name = f"rollout-joining-{self._rooms_asked}"
            self._rooms[name] = self._actor_groups.request_placement_group(name)

    def step_completed(self) -> None:
        """Take note that a step was completed."""
        for replica in self.replicas:
            self._event(replica, StepCompleted())

    def _let_in(self, now: float) -> None:
        """Start a replica in every room that was granted meanwhile."""
        for name in [name for name, room in self._rooms.items() if room.wait(0)]:
            del self._rooms[name]
            building = self._actor_groups.add_replica(name)
            group = self._actor_groups["rollout"]
            rank = len(group) - 1
            health = Health("rebuilding", since=now)
            self.replicas.append(Replica(rank, group.names[rank], group.handles[rank], health, building))
            self._joining.add(rank)
            self._down_since[rank] = now

    def _built(self, replica: Replica) -> None:
        building, replica.building = replica.building, None
        try:
            fetch(building, "rebuild", replica.name)
        except ActorLostError as error:
            self.lost(replica, error)
            return
        self._event(replica, Built())
        if self._watch:
            self._watch.add(replica.name, replica.handle)

    def _event(self, replica: Replica, event: Event) -> None:
        replica.health = advance(replica.health, event, time.monotonic(), self._retry)

    def _check_enough(self, now: float) -> None:
        serving = len(self.serving) + len(self.stale)
        if serving >= max(self._minimum, 1):
            self._short_since = None
            return
        self._short_since = now if self._short_since is None else self._short_since
        abandoned = [replica for replica in self.replicas if replica.health.state == "abandoned"]
        hopeless = len(self.replicas) - len(abandoned) < max(self._minimum, 1)
        if hopeless or now - self._short_since > self._patience:
            reasons = "; ".join(dict.fromkeys(r.health.reason for r in self.replicas if r.health.reason))
            raise ActorLostError(
                f"rollout replicas: {serving} of {len(self.replicas)} serve, {max(self._minimum, 1)} are needed "
                f"(recovery.min_replicas), since {now - self._short_since:.0f} s ({reasons})"
            )
