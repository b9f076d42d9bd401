"""Synchronization of a new weight version from the policy to the rollout replicas.

Replicas that were put to sleep before the update wake up with the sync.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from rayrlhf.actors.placement import Transfer
from rayrlhf.actors.replica_pool import ReplicaPool, RolloutReplica
from rayrlhf.actors.role_groups import PolicyGroup
from rayrlhf.actors.waiting import wait_all
from rayrlhf.errors import ActorLostError, DeadlineError
from rayrlhf.weight_sync.buckets import SyncDtype
from rayrlhf.weight_sync.object_store import ObjectStoreTransfer
from rayrlhf.weight_sync.vllm_device import VLLMDeviceTransfer

SLEEP = "sleep"


class SyncReport(NamedTuple):
    """Version, number of buckets and duration of one sync."""

    version: int
    buckets: int
    seconds: float


class WeightTransfer(Protocol):
    """Transport of weights from the policy to rollout replicas."""

    def send(self, policy: PolicyGroup, pool: ReplicaPool, replicas: Sequence[RolloutReplica], version: int) -> int:
        """Send the policy's weights; returns the number of buckets, 0 if the transport has none.

        Calls `pool.synced` for every replica that serves them, and `pool.lost` for every replica that is lost.

        Raises:
            DeadlineError: the policy did not send within the deadline.
            ActorLostError: a rank of the policy is lost.
        """


def make_transfer(
    transfer: Transfer, devices: int, dtype: SyncDtype, seconds: float, *, adapters: bool = False
) -> WeightTransfer:
    """Create a transfer to replicas of so many devices.

    Adapters alone are small and use the object store.
    """
    if adapters or transfer == "shared_memory":
        return ObjectStoreTransfer(dtype, seconds, adapters)
    return VLLMDeviceTransfer(transfer, devices, dtype, seconds)


def sync_weights(
    policy: PolicyGroup, pool: ReplicaPool, replicas: Sequence[RolloutReplica], version: int, transfer: WeightTransfer
) -> SyncReport:
    """Send a weight version to replicas; returns when all that were not lost serve it.

    Errors as in `WeightTransfer.send`.
    """
    started = time.monotonic()
    buckets = transfer.send(policy, pool, replicas, version)
    return SyncReport(version, buckets, time.monotonic() - started)


def put_to_sleep(pool: ReplicaPool, seconds: float) -> None:
    """Free the replicas' memory until the next sync; the pool rebuilds any that are lost."""
    pending = [(replica, replica.sleep()) for replica in pool.serving]
    for replica, call in pending:
        try:
            wait_all({replica.name: call}, SLEEP, seconds)
        except (ActorLostError, DeadlineError) as error:
            pool.lost(replica, error)
