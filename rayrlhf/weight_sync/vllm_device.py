"""Weight transfer from GPU to GPU through vLLM's `nccl` or `ipc`, seen from the driver.

The policy sends to the replicas itself: `vllm_sender.py` is its end, `vllm_receiver.py` the replicas'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rayrlhf.actors.replica_client import DeviceSyncRequest
from rayrlhf.actors.replica_pool import ReplicaPool, RolloutReplica
from rayrlhf.actors.role_groups import PolicyGroup
from rayrlhf.errors import ActorLostError, DeadlineError
from rayrlhf.weight_sync.buckets import SyncDtype
from rayrlhf.weight_sync.object_store import SYNC


@dataclass(frozen=True, slots=True)
class VLLMDeviceTransfer:
    """Implements `WeightTransfer` for `rollout.weight_transfer: nccl` and `ipc`.

    Attributes:
        workers: GPU processes per replica.
        dtype: data type of the weights.
        seconds: deadline of the transfer.
    """

    transfer: Literal["nccl", "ipc"]
    workers: int
    dtype: SyncDtype
    seconds: float

    def send(self, policy: PolicyGroup, pool: ReplicaPool, replicas: Sequence[RolloutReplica], version: int) -> int:
        """Send the weights; see `WeightTransfer`.

        All members share one communicator, so the loss of one ends the transfer for all.
        """
        if not replicas:
            return 0
        receivers = tuple((replica.name, replica.handle) for replica in replicas)
        request = DeviceSyncRequest(self.transfer, receivers, self.workers, version, self.dtype)
        try:
            policy.wait(policy.send_weights(request), SYNC, self.seconds)
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
        return 0
