"""Carrying a new weight version from the policy to every rollout replica.

Rank 0 of the policy streams buckets as return values (they belong to the driver and survive the trainer's death); each
reference is handed to all replicas, which read the bytes in place: one copy a node, and the driver never holds weights.
Replicas that were put to sleep before the update wake up with the sync. With `rollout.weight_transfer: nccl` or `ipc` the
policy sends from GPU to GPU instead, and the driver only says to whom.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import ray

from rayrlhf.actors.actor_group import ActorGroup
from rayrlhf.actors.pending_calls import track_calls
from rayrlhf.actors.replica_client import DeviceSyncRequest
from rayrlhf.actors.replica_pool import Replica, ReplicaPool
from rayrlhf.actors.waiting import INFRASTRUCTURE_ERRORS, lost_because, overrun, wait_all
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.errors import ActorLostError, DeadlineError

BUCKET_BYTES = 256 * 2**20
SYNC = "weight sync"
SLEEP = "sleep"


class SyncReport(NamedTuple):
    """What a sync took."""

    version: int
    buckets: int
    seconds: float


def sync_weights(
    policy: ActorGroup,
    pool: ReplicaPool,
    replicas: Sequence[Replica],
    version: int,
    dtype: Literal["float32", "bfloat16"],
    seconds: float,
    rollout: RolloutSection,
) -> SyncReport:
    """Bring replicas to `version`; returns when all of them that are still there serve it.

    A replica that is lost meanwhile is left to the pool; it will get the weights when it has been rebuilt.

    Raises:
        DeadlineError: a bucket was not produced within `seconds`.
        ActorLostError: a rank of the policy is lost.
    """
    started = time.monotonic()
    if rollout.weight_transfer != "shared_memory":
        names = tuple((replica.name, replica.handle) for replica in replicas)
        order = DeviceSyncRequest(rollout.weight_transfer, names, rollout.tensor_parallel_size, version, dtype)
        _between_devices(policy, pool, replicas, order, seconds)
        return SyncReport(version, 0, time.monotonic() - started)
    others = {
        name: handle.join_weights.remote(BUCKET_BYTES, dtype)
        for name, handle in zip(policy.names[1:], policy.handles[1:], strict=True)
    }
    stream = policy.handles[0].weights.remote(BUCKET_BYTES, dtype)
    pending = {replica.rank: [replica.handle.begin_weights.remote(version)] for replica in replicas}
    buckets = 0
    for bucket in _buckets(stream, policy.names[0], seconds):
        for replica in replicas:
            pending[replica.rank].append(replica.handle.receive_weights.remote(bucket))
        buckets += 1
    policy.wait(others, SYNC, seconds)
    for replica in replicas:
        pending[replica.rank].append(replica.handle.finish_weights.remote())
    for replica in replicas:
        try:
            for call in pending[replica.rank]:
                wait_all({replica.name: call}, SYNC, seconds)
            pool.synced(replica)
        except (ActorLostError, DeadlineError) as error:
            # A bucket that was never made fails where it arrives: then the policy is to blame, not the replica.
            name = policy.gone()
            if name is not None:
                raise ActorLostError(f"{name} was lost during {SYNC}", name) from error
            pool.lost(replica, error)
    return SyncReport(version, buckets, time.monotonic() - started)


def _between_devices(
    policy: ActorGroup, pool: ReplicaPool, replicas: Sequence[Replica], order: DeviceSyncRequest, seconds: float
) -> None:
    """Let the policy send to the replicas itself. They share one communicator: the loss of a member is the loss of all."""
    if not replicas:
        return
    try:
        policy.wait(policy.call("send_weights", order), SYNC, seconds)
    except (ActorLostError, DeadlineError) as error:
        for replica in replicas:
            pool.lost(replica, error)
        if isinstance(error, DeadlineError) or error.actor not in {replica.name for replica in replicas}:
            raise
        if len(policy) > 1:
            # The other ranks wait for rank 0 in the middle of gathering.
            raise ActorLostError(f"{policy.names[0]} left the others in {SYNC}: {error}", policy.names[0]) from error
    else:
        for replica in replicas:
            pool.synced(replica)


def put_to_sleep(pool: ReplicaPool, seconds: float) -> None:
    """Let the replicas give their memory back until the next sync; one that is lost at it is left to the pool."""
    pending = [(replica, replica.handle.sleep.remote()) for replica in pool.serving]
    for replica, call in pending:
        try:
            wait_all({replica.name: call}, SLEEP, seconds)
        except (ActorLostError, DeadlineError) as error:
            pool.lost(replica, error)


def _buckets(stream: Any, name: str, seconds: float) -> Iterator[ray.ObjectRef]:
    """References to the policy's buckets; the end of the stream, or the reason why there is none."""
    while True:
        with track_calls(SYNC, {name: time.monotonic()}):
            ready, _ = ray.wait([stream], timeout=seconds)
        if not ready:
            raise overrun(f"{SYNC}: next bucket", [name], seconds)
        try:
            bucket = next(stream)
        except StopIteration:
            return
        except INFRASTRUCTURE_ERRORS as error:
            raise ActorLostError(f"{name} was lost during {SYNC}: {lost_because(error)}", name) from error
        yield bucket
