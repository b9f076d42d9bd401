"""The policy's voice to the replicas in a transfer of weights from GPU to GPU: vLLM's client protocol, on actor handles."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray

from rayrlhf.actors.waiting import INFRASTRUCTURE_ERRORS, lost_because
from rayrlhf.errors import ActorLostError


@dataclass(frozen=True, slots=True)
class DeviceSyncRequest:
    """What every rank of the policy is told of one transfer.

    Attributes:
        transfer: vLLM's `nccl` or `ipc`.
        replicas: (name, handle) of those that are to have the weights.
        workers: GPU processes of each of them.
        version: the weights' version.
        dtype: what the samplers hold them in.
    """

    transfer: Literal["nccl", "ipc"]
    replicas: tuple[tuple[str, Any], ...]
    workers: int
    version: int
    dtype: Literal["float32", "bfloat16"]

    @property
    def members(self) -> tuple[str, ...]:
        """The replicas' processes: one that was rebuilt has the old name and another id."""
        return tuple(f"{name} {handle._ray_actor_id.hex()}" for name, handle in self.replicas)


class ReplicaClient:
    """The four calls of vLLM's `VLLMWeightSyncClient`; each returns when all replicas have answered.

    Raises:
        ActorLostError: a replica is gone; names it.
    """

    def __init__(self, order: DeviceSyncRequest) -> None:
        """Speak to the replicas of an order."""
        self._order = order

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let all meet the trainer; in a group with ranks, each replica's come after those of the one before."""
        infos = [dict(init_info) for _ in self._order.replicas]
        if "rank_offset" in init_info:
            for index, info in enumerate(infos):
                info["rank_offset"] += index * self._order.workers
        self._all("open_transfer", [(info,) for info in infos])

    def start_weight_update(self) -> None:
        """Open the models."""
        self._all("begin_weights", [(self._order.version,)] * len(self._order.replicas))

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Receive."""
        self._all("receive_transfer", [(update_info,)] * len(self._order.replicas))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Make the weights current; the version is the order's."""
        self._all("finish_weights", [()] * len(self._order.replicas))

    def _all(self, method: str, arguments: Iterable[Sequence[Any]]) -> None:
        calls = [
            (name, getattr(handle, method).remote(*given))
            for (name, handle), given in zip(self._order.replicas, arguments, strict=True)
        ]
        for name, call in calls:
            try:
                ray.get(call)
            except INFRASTRUCTURE_ERRORS as error:
                raise ActorLostError(f"{name} was lost during {method}: {lost_because(error)}", name) from error
