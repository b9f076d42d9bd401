"""Pool of rollout replicas, which may be lost, rebuilding or without the current weights.

The pool never blocks on a rebuild. It starts a rebuild when it is due and offers its `build` as a reference to wait on together
with other work. The new process is `stale` until it has the current weights.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.health import Built, Event, Health, Lost, RetryPolicy, Started, StepCompleted, Synced, advance
from rayrlhf.actors.heartbeat import HeartbeatMonitor
from rayrlhf.actors.rebuild import RecoveryListener
from rayrlhf.actors.remote import Handle, Ref, as_argument, remote_call
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.actors.waiting import fetch, overrun
from rayrlhf.data.records import Rollout, RolloutRequest
from rayrlhf.errors import ActorLostError, DeviceMemoryError
from rayrlhf.weight_sync.buckets import SharedTensor


@dataclass
class RolloutReplica:
    """One rollout replica, with the calls of its actor.

    Attributes:
        name: `<run>/rollout/<rank>`.
        building: its pending `build` while it is being rebuilt.
    """

    rank: int
    name: str
    handle: Handle[RolloutActor]
    health: Health
    building: Ref[None] | None = None

    def submit(self, requests: Sequence[RolloutRequest], temperature: float, max_new_tokens: int) -> Ref[None]:
        """Queue requests."""
        return remote_call(self.handle, RolloutActor.submit, requests, temperature, max_new_tokens)

    def poll(self, minimum: int, seconds: float | None = None) -> Ref[tuple[list[Rollout], int]]:
        """Decode queued requests; see `RolloutActor.poll`."""
        return remote_call(self.handle, RolloutActor.poll, minimum, seconds)

    def cancel(self) -> Ref[int]:
        """Drop all unfinished requests; the result is the tokens that were sampled for them."""
        return remote_call(self.handle, RolloutActor.cancel)

    def sleep(self) -> Ref[None]:
        """Free memory until the next weights arrive."""
        return remote_call(self.handle, RolloutActor.sleep)

    def begin_weights(self, version: int) -> Ref[None]:
        """Start receiving a weight version."""
        return remote_call(self.handle, RolloutActor.begin_weights, version)

    def receive_weights(self, bucket: Ref[list[SharedTensor]]) -> Ref[None]:
        """Load one bucket."""
        return remote_call(self.handle, RolloutActor.receive_weights, as_argument(bucket))

    def finish_weights(self) -> Ref[int]:
        """Make the new weights current; the result is their version."""
        return remote_call(self.handle, RolloutActor.finish_weights)


class ReplicaPool:
    """All replicas of a run; none in one that only replays.

    Args:
        monitor: pings the replicas; None for no pings.
        minimum: replicas that must serve.
        patience: maximum time below the minimum, in seconds.
        listener: receives losses and recoveries.
        enabled: False raises at the first loss.
        build_seconds: maximum time of one rebuild.
    """

    def __init__(
        self,
        actor_groups: ActorGroups,
        retry: RetryPolicy | None = None,
        monitor: HeartbeatMonitor | None = None,
        minimum: int = 1,
        patience: float = 600.0,
        listener: RecoveryListener = lambda *_: None,
        enabled: bool = True,
        build_seconds: float = 600.0,
    ) -> None:
        self._actor_groups = actor_groups
        self._retry = retry or RetryPolicy()
        self._monitor = monitor
        self._patience = patience
        self._listener = listener
        self._enabled = enabled
        self._build_seconds = build_seconds
        now, present = time.monotonic(), "rollout" in actor_groups
        named = zip(actor_groups["rollout"].names, actor_groups["rollout"].handles, strict=True) if present else ()
        self.replicas = [RolloutReplica(rank, name, handle, Health(since=now)) for rank, (name, handle) in enumerate(named)]
        self._minimum = max(minimum, 1) if present else 0
        self._requested: dict[str, PlacementGroup] = {}
        self._request_count = 0
        self._joining: set[int] = set()
        self._down_since: dict[int, float] = {}
        self._short_since: float | None = None

    @property
    def serving(self) -> list[RolloutReplica]:
        """Replicas that accept requests."""
        return [replica for replica in self.replicas if replica.health.serves]

    @property
    def stale(self) -> list[RolloutReplica]:
        """Rebuilt replicas that wait for the current weights."""
        return [replica for replica in self.replicas if replica.health.state == "stale"]

    @property
    def building(self) -> dict[str, Ref[None]]:
        """Pending builds by actor name."""
        return {replica.name: replica.building for replica in self.replicas if replica.building is not None}

    @property
    def losses(self) -> int:
        """Number of replicas that do not serve at the moment."""
        return len(self.replicas) - len(self.serving)

    def lost(self, replica: RolloutReplica, error: Exception) -> None:
        """Record the loss of a replica, kill its process, and start a rebuild when due.

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
        if self._monitor:
            self._monitor.remove(replica.name)
        ray.kill(replica.handle)
        self._listener("lost", replica.name, str(error), 0.0)
        self.poll_rebuilds()

    def poll_rebuilds(self) -> None:
        """Start due rebuilds and check pending ones, without waiting.

        Raises:
            UserError: a rebuild shows a mistake in the configuration.
            ActorLostError: too few replicas have served for too long.
        """
        now = time.monotonic()
        self._start_joining(now)
        for replica in self.replicas:
            if replica.health.is_due(now):
                replica.building = self._actor_groups.restart("rollout", replica.rank)
                replica.handle = self._actor_groups["rollout"].handles[replica.rank]
                self._watch(replica, self._build_seconds)
                self._event(replica, Started())
            elif replica.building is not None and ray.wait([replica.building], timeout=0)[0]:
                self._finish_build(replica, replica.building)
            elif replica.building is not None and now - replica.health.since > self._build_seconds:
                self.lost(replica, overrun("rebuild", [replica.name], self._build_seconds))
        self._check_enough(now)

    def synced(self, replica: RolloutReplica) -> None:
        """Record that a replica serves the current weights."""
        if replica.health.state == "stale":
            self._event(replica, Synced())
            seconds = time.monotonic() - self._down_since.pop(replica.rank, time.monotonic())
            self._listener("joined" if replica.rank in self._joining else "recovered", replica.name, "", seconds)
            self._joining.discard(replica.rank)

    def scale(self, count: int) -> None:
        """Add or remove replicas until there are `count`; must be called between steps.

        Unfinished requests of removed replicas go to the others. New replicas request a placement group and join once it is
        scheduled, possibly on an autoscaled node.
        """
        while len(self.replicas) + len(self._requested) > count:
            if self._requested:
                self._actor_groups.release_placement_group(self._requested.popitem()[0])
                continue
            replica = self.replicas.pop()
            if self._monitor:
                self._monitor.remove(replica.name)
            self._down_since.pop(replica.rank, None)
            self._joining.discard(replica.rank)
            self._actor_groups.remove_replica()
            self._listener("left", replica.name, f"{count} replicas are wanted", 0.0)
        while len(self.replicas) + len(self._requested) < count:
            self._request_count += 1
            name = f"rollout-joining-{self._request_count}"
            self._requested[name] = self._actor_groups.request_placement_group(name)

    def step_completed(self) -> None:
        """Reset the counts of rebuilds in a row."""
        for replica in self.replicas:
            self._event(replica, StepCompleted())

    def _start_joining(self, now: float) -> None:
        """Start a replica in every requested placement group that was granted."""
        for name in [name for name, requested in self._requested.items() if requested.wait(0)]:
            del self._requested[name]
            building = self._actor_groups.add_replica(name)
            group = self._actor_groups["rollout"]
            rank = len(group) - 1
            health = Health("rebuilding", since=now)
            self.replicas.append(RolloutReplica(rank, group.names[rank], group.handles[rank], health, building))
            self._watch(self.replicas[-1], self._build_seconds)
            self._joining.add(rank)
            self._down_since[rank] = now

    def _finish_build(self, replica: RolloutReplica, building: Ref[None]) -> None:
        replica.building = None
        try:
            fetch(building, "rebuild", replica.name)
        except (ActorLostError, DeviceMemoryError) as error:
            # The models in training may give memory back before the next attempt, at the end of their call.
            self.lost(replica, error)
            return
        self._event(replica, Built())
        self._watch(replica)

    def _watch(self, replica: RolloutReplica, loading_seconds: float = 0.0) -> None:
        if self._monitor:
            self._monitor.add(replica.name, replica.handle, loading_seconds)

    def _event(self, replica: RolloutReplica, event: Event) -> None:
        replica.health = advance(replica.health, event, time.monotonic(), self._retry)

    def _check_enough(self, now: float) -> None:
        serving = len(self.serving) + len(self.stale)
        if serving >= self._minimum:
            self._short_since = None
            return
        self._short_since = now if self._short_since is None else self._short_since
        abandoned = [replica for replica in self.replicas if replica.health.state == "abandoned"]
        hopeless = len(self.replicas) - len(abandoned) < self._minimum
        if hopeless or now - self._short_since > self._patience:
            reasons = "; ".join(dict.fromkeys(r.health.reason for r in self.replicas if r.health.reason))
            raise ActorLostError(
                f"rollout replicas: {serving} of {len(self.replicas)} serve, {self._minimum} are needed "
                f"(recovery.min_replicas), since {now - self._short_since:.0f} s ({reasons})"
            )
