"""Fault tolerance of a run's actors, assembled from the configuration."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.actor_restarter import ActorRestarter
from rayrlhf.actors.health import RetryPolicy
from rayrlhf.actors.heartbeat import HeartbeatMonitor
from rayrlhf.actors.rebuild import RecoveryListener
from rayrlhf.actors.replica_pool import ReplicaPool
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.runtime import RecoverySection


@dataclass(frozen=True, slots=True)
class FaultTolerance:
    """Objects that monitor and rebuild the actors of a run.

    Attributes:
        restarter: restarts reward and reference actors.
        retry: bounds of rebuilding, for policy and critic too.
        monitor: pings all actors; None for no pings.
    """

    pool: ReplicaPool
    restarter: ActorRestarter
    retry: RetryPolicy
    monitor: HeartbeatMonitor | None = None

    def step_completed(self) -> None:
        """Reset the counts of rebuilds in a row."""
        self.pool.step_completed()
        self.restarter.step_completed()


def retry_policy(section: RecoverySection) -> RetryPolicy:
    """Return the configured bounds of rebuilding."""
    return RetryPolicy(section.attempts, section.backoff, section.ping_deadline)


def make_fault_tolerance(
    config: PPOConfig,
    actor_groups: ActorGroups,
    monitor: HeartbeatMonitor | None = None,
    listener: RecoveryListener = lambda *_: None,
) -> FaultTolerance:
    """Create the fault tolerance of actors that have been built."""
    section = config.recovery
    retry = retry_policy(section)
    start = config.deadlines.start
    pool = ReplicaPool(
        actor_groups,
        retry,
        monitor,
        section.min_replicas,
        section.replica_wait,
        listener,
        enabled=section.enabled,
        build_seconds=start,
    )
    restarter = ActorRestarter(actor_groups, retry, start, monitor, listener, enabled=section.enabled)
    return FaultTolerance(pool, restarter, retry, monitor)


@contextmanager
def monitored(
    config: PPOConfig,
    actor_groups: ActorGroups,
    listener: RecoveryListener,
    on_output: Callable[[str, Sequence[str]], None],
    on_stacks: Callable[[str, str], None],
) -> Iterator[FaultTolerance]:
    """Ping and rebuild actors that have been built, inside the block.

    `on_output` receives the output of user code, `on_stacks` the stacks of actors that hang.
    """
    retry, every = retry_policy(config.recovery), config.recovery.ping_every
    with HeartbeatMonitor(retry, every, listener, on_output, on_stacks) as monitor:
        for group in actor_groups.groups.values():
            for name, handle in zip(group.names, group.handles, strict=True):
                monitor.add(name, handle)
        yield make_fault_tolerance(config, actor_groups, monitor, listener)
