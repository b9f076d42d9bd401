"""Everything that keeps a run's actors alive, put together from the configuration."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rayrlhf.actors.actor_groups import Crew
from rayrlhf.actors.actor_restarter import Healer, LossNote
from rayrlhf.actors.health import RetryPolicy
from rayrlhf.actors.heartbeat import Watch
from rayrlhf.actors.replica_pool import ReplicaPool
from rayrlhf.config.ppo import PPOConfig


@dataclass(frozen=True, slots=True)
class Care:
    """Who looks after which actors.

    Attributes:
        pool: the rollout replicas.
        healer: reward and reference.
        policy: bounds of rebuilding, for the gangs too.
        watch: pings all of them; None for no pings.
    """

    pool: ReplicaPool
    healer: Healer
    policy: RetryPolicy
    watch: Watch | None = None

    def settled(self) -> None:
        """Take note that a step was completed: rebuilds so far no longer count."""
        self.pool.settled()
        self.healer.settled()


def make_care(config: PPOConfig, crew: Crew, watch: Watch | None = None, note: LossNote = lambda *_: None) -> Care:
    """Look after actors that have been built."""
    section = config.recovery
    policy = RetryPolicy(section.attempts, section.backoff, section.ping_deadline)
    start = config.deadlines.start
    pool = ReplicaPool(
        crew, policy, watch, section.min_replicas, section.replica_wait, note, enabled=section.enabled, build_seconds=start
    )
    return Care(pool, Healer(crew, policy, start, watch, note, enabled=section.enabled), policy, watch)


@contextmanager
def watched(config: PPOConfig, crew: Crew, note: LossNote) -> Iterator[Care]:
    """Look after actors that have been built, and ping them, inside the block."""
    section = config.recovery
    policy = RetryPolicy(section.attempts, section.backoff, section.ping_deadline)
    with Watch(policy, section.ping_every, lambda name, line: note("hung", name, line, 0.0)) as watch:
        for group in crew.groups.values():
            for name, handle in zip(group.names, group.handles, strict=True):
                watch.add(name, handle)
        yield make_care(config, crew, watch, note)
