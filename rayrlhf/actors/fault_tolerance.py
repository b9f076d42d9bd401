"""Everything that keeps a run's actors alive, put together from the configuration."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.actor_restarter import ActorRestarter, LossNote
from rayrlhf.actors.health import RetryPolicy
from rayrlhf.actors.heartbeat import HeartbeatMonitor
from rayrlhf.actors.replica_pool import ReplicaPool
from rayrlhf.config.ppo import PPOConfig


@dataclass(frozen=True, slots=True)
class FaultTolerance:
    """Who looks after which actors.

    Attributes:
        pool: the rollout replicas.
        restarter: reward and reference.
        retry: bounds of rebuilding, for the gangs too.
        watch: pings all of them; None for no pings.
    """

    pool: ReplicaPool
    restarter: ActorRestarter
    retry: RetryPolicy
    monitor: HeartbeatMonitor | None = None

    def step_completed(self) -> None:
        """Take note that a step was completed: rebuilds so far no longer count."""
        self.pool.step_completed()
        self.restarter.step_completed()


def make_fault_tolerance(
    config: PPOConfig, actor_groups: ActorGroups, monitor: HeartbeatMonitor | None = None, note: LossNote = lambda *_: None
) -> FaultTolerance:
    """Look after actors that have been built."""
    section = config.recovery
    retry = RetryPolicy(section.attempts, section.backoff, section.ping_deadline)
    start = config.deadlines.start
    pool = ReplicaPool(
        actor_groups,
        retry,
        monitor,
        section.min_replicas,
        section.replica_wait,
        note,
        enabled=section.enabled,
        build_seconds=start,
    )
    return FaultTolerance(
        pool, ActorRestarter(actor_groups, retry, start, monitor, note, enabled=section.enabled), retry, monitor
    )


@contextmanager
def monitored(config: PPOConfig, actor_groups: ActorGroups, note: LossNote) -> Iterator[FaultTolerance]:
    """Look after actors that have been built, and ping them, inside the block."""
    section = config.recovery
    retry = RetryPolicy(section.attempts, section.backoff, section.ping_deadline)
    with HeartbeatMonitor(retry, section.ping_every, lambda name, line: note("hung", name, line, 0.0)) as monitor:
        for group in actor_groups.groups.values():
            for name, handle in zip(group.names, group.handles, strict=True):
                monitor.add(name, handle)
        yield make_fault_tolerance(config, actor_groups, monitor, note)
