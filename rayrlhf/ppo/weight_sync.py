"""Carrying a new weight version from the policy to every rollout replica.

Rank 0 of the policy streams buckets as return values (they belong to the driver and survive the trainer's death); each
reference is handed to all replicas, which read the bytes in place: one copy a node, and the driver never holds weights.
"""

import time
from typing import NamedTuple

import ray

from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.waiting import overrun, wait_all

BUCKET_BYTES = 256 * 2**20


class SyncReport(NamedTuple):
    """What a sync took."""

    version: int
    buckets: int
    seconds: float


def sync_weights(policy: ActorGroup, replicas: ActorGroup, version: int, dtype: str, seconds: float) -> SyncReport:
    """Bring every replica to `version`; returns when all serve it.

    Raises:
        DeadlineError: a bucket was not produced or taken in within `seconds`.
    """
    started = time.monotonic()
    others = {
        name: handle.join_weights.remote(BUCKET_BYTES, dtype)
        for name, handle in zip(policy.names[1:], policy.handles[1:], strict=True)
    }
    stream = policy.handles[0].weights.remote(BUCKET_BYTES, dtype)
    pending = [replicas.call("begin_weights", version)]
    buckets = 0
    while True:
        ready, _ = ray.wait([stream], timeout=seconds)
        if not ready:
            raise overrun("weight sync: next bucket", [policy.names[0]], seconds)
        try:
            bucket = next(stream)
        except StopIteration:
            break
        pending.append(replicas.call("receive_weights", bucket))
        buckets += 1
    pending.append(replicas.call("finish_weights"))
    for calls in pending:
        wait_all(calls, "weight sync", seconds)
    wait_all(others, "weight sync", seconds)
    return SyncReport(version, buckets, time.monotonic() - started)
