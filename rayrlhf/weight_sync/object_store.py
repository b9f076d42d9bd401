"""Weight transfer through Ray's object store (shared memory).

Rank 0 of the policy streams buckets as return values, which belong to the driver and survive the policy's death. Every replica
gets the references and reads the bytes in place: one copy per node, and the driver never holds weights.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ray

from rayrlhf.actors.remote import Ref
from rayrlhf.actors.replica_pool import ReplicaPool, RolloutReplica
from rayrlhf.actors.role_groups import PolicyGroup
from rayrlhf.actors.waiting import INFRASTRUCTURE_ERRORS, lost_because, overrun, track_calls, wait_all
from rayrlhf.errors import ActorLostError, DeadlineError
from rayrlhf.weight_sync.buckets import SharedTensor, SyncDtype

BUCKET_BYTES = 256 * 2**20
SYNC = "weight sync"


@dataclass(frozen=True, slots=True)
class ObjectStoreTransfer:
    """Implements `WeightTransfer` for `rollout.weight_transfer: shared_memory`, and for adapters.

    Attributes:
        dtype: data type of the weights.
        seconds: deadline of each wait.
        adapters: send the policy's adapters only.
    """

    dtype: SyncDtype
    seconds: float
    adapters: bool = False

    def send(self, policy: PolicyGroup, pool: ReplicaPool, replicas: Sequence[RolloutReplica], version: int) -> int:
        """Send the weights; see `WeightTransfer`."""
        gathering = policy.join_weights(self.dtype, self.adapters)
        stream = policy.weights(BUCKET_BYTES, self.dtype, self.adapters)
        pending: dict[int, list[Ref[object]]] = {replica.rank: [replica.begin_weights(version)] for replica in replicas}
        buckets = 0
        for bucket in self._buckets(stream, policy.names[0]):
            for replica in replicas:
                pending[replica.rank].append(replica.receive_weights(bucket))
            buckets += 1
        policy.wait(gathering, SYNC, self.seconds)
        for replica in replicas:
            pending[replica.rank].append(replica.finish_weights())
        for replica in replicas:
            try:
                for call in pending[replica.rank]:
                    wait_all({replica.name: call}, SYNC, self.seconds)
                pool.synced(replica)
            except (ActorLostError, DeadlineError) as error:
                # A bucket that was never produced fails on its receiver. Then the policy is lost, not the replica.
                name = policy.find_lost()
                if name is not None:
                    raise ActorLostError(f"{name} was lost during {SYNC}", name) from error
                pool.lost(replica, error)
        return buckets

    def _buckets(self, stream: Iterator[Ref[list[SharedTensor]]], name: str) -> Iterator[Ref[list[SharedTensor]]]:
        """Yield references to the policy's buckets, with a deadline for each."""
        while True:
            with track_calls(SYNC, {name: time.monotonic()}):
                ready, _ = ray.wait([stream], timeout=self.seconds)
            if not ready:
                raise overrun(f"{SYNC}: next bucket", [name], self.seconds)
            try:
                bucket = next(stream)
            except StopIteration:
                return
            except INFRASTRUCTURE_ERRORS as error:
                raise ActorLostError(f"{name} was lost during {SYNC}: {lost_because(error)}", name) from error
            yield bucket
