"""vLLM's weight-transfer client on actor handles, through which the policy drives the replicas."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ray

from rayrlhf.actors.remote import Handle, Ref, remote_call
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.actors.waiting import INFRASTRUCTURE_ERRORS, lost_because
from rayrlhf.errors import ActorLostError
from rayrlhf.weight_sync.buckets import SyncDtype

ReplicaHandle = Handle[RolloutActor]


@dataclass(frozen=True, slots=True)
class DeviceSyncRequest:
    """Request to every rank of the policy for one transfer of weights.

    Attributes:
        transfer: vLLM's `nccl` or `ipc`.
        replicas: (name, handle) of the receiving replicas.
        workers: GPU processes per replica.
        dtype: data type in which the rollout engines hold the weights.
    """

    transfer: Literal["nccl", "ipc"]
    replicas: tuple[tuple[str, ReplicaHandle], ...]
    workers: int
    version: int
    dtype: SyncDtype

    @property
    def members(self) -> tuple[str, ...]:
        """Names and ids of the replicas' processes; a rebuilt process has another id."""
        return tuple(f"{name} {handle._ray_actor_id.hex()}" for name, handle in self.replicas)


class ReplicaClient:
    """The four calls of vLLM's `VLLMWeightSyncClient`; each returns when all replicas have finished it.

    Raises:
        ActorLostError: a replica is gone; names it.
    """

    def __init__(self, request: DeviceSyncRequest) -> None:
        """Call the replicas of a request."""
        self._request = request

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect all replicas to the trainer.

        In a group with ranks, the ranks of each replica come after those of the previous one.
        """
        infos = [dict(init_info) for _ in self._request.replicas]
        if "rank_offset" in init_info:
            for index, info in enumerate(infos):
                info["rank_offset"] += index * self._request.workers
        self._call("open_transfer", lambda index, handle: remote_call(handle, RolloutActor.open_transfer, infos[index]))

    def start_weight_update(self) -> None:
        """Prepare the models for new weights."""
        version = self._request.version
        self._call("begin_weights", lambda _, handle: remote_call(handle, RolloutActor.begin_weights, version))

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Receive weights."""
        self._call("receive_transfer", lambda _, handle: remote_call(handle, RolloutActor.receive_transfer, update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Make the weights current; the version is the request's."""
        self._call("finish_weights", lambda _, handle: remote_call(handle, RolloutActor.finish_weights))

    def _call(self, what: str, send: Callable[[int, ReplicaHandle], Ref[object]]) -> None:
        calls = [(name, send(index, handle)) for index, (name, handle) in enumerate(self._request.replicas)]
        for name, call in calls:
            try:
                ray.get(call)
            except INFRASTRUCTURE_ERRORS as error:
                raise ActorLostError(f"{name} was lost during {what}: {lost_because(error)}", name) from error
