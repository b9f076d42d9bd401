"""The policy's end of vLLM's `nccl` and `ipc` transfers from GPU to GPU.

`nccl` broadcasts from rank 0 of the policy to replicas on other devices. `ipc` lets a replica read the memory of a policy rank
on its own device, buffer by buffer. vLLM's trainer engines drive both through the four calls of a client. `EngineSource`
supplies their weights. `DeviceSender` opens a new group whenever the replicas have changed, since a communicator cannot
gain or lose a member.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, VLLMWeightSyncClient, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

DeviceTransfer = Literal["nccl", "ipc"]
Rendezvous = Callable[[], tuple[str, int]]
"""Returns this node's address and a free port."""
BUFFER_BYTES = 256 * 2**20
"""Minimum device memory that `ipc` shares at a time."""


class EngineSource(WeightSource):  # type: ignore[misc]
    """Weights of a train engine tensor by tensor; every pass is a collective call.

    Args:
        tensors: starts a new pass over (Hugging Face name, tensor on the device).
    """

    def __init__(self, tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
        self._tensors = tensors
        self._metadata: list[ParamMeta] = []

    def metadata(self) -> list[ParamMeta]:
        """Return names, dtypes and shapes, read in one pass; they never change."""
        if not self._metadata:
            self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors()]
        return self._metadata

    def buffer_bytes(self) -> int:
        """Return `BUFFER_BYTES` or the size of the largest tensor, which vLLM does not split."""
        sizes = (math.prod(one.shape) * one.dtype.itemsize for one in self.metadata())
        return int(max(BUFFER_BYTES, *sizes))

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Start a new pass."""
        return self._tensors()


class DeviceSender:
    """One policy rank's end of a transfer.

    Args:
        rank: this process's rank in the policy; rank 0 sends, the others take part in gathering.
    """

    def __init__(self, transfer: DeviceTransfer, rank: int, source: EngineSource) -> None:
        self._transfer = transfer
        self._rank = rank
        self._source = source
        self._members: tuple[str, ...] = ()
        self._engine: TrainerWeightTransferEngine | None = None

    def send(self, client: VLLMWeightSyncClient, members: tuple[str, ...], workers: int, rendezvous: Rendezvous) -> None:
        """Send the weights to all replicas; a collective call.

        Args:
            client: calls the replicas.
            members: names of the replicas' processes; a rebuilt process must have another name.
            workers: number of processes of all replicas.
            rendezvous: called when a group is opened.

        An error of the client ends the call. The group is dropped then, and the next call opens another.
        """
        # Kept only if all goes well, and not closed otherwise: a communicator whose peers are gone may wait for them.
        engine, self._engine = self._engine, None
        if engine is None or members != self._members:
            if engine is not None:
                engine.shutdown()
            engine = self._open(client, workers, rendezvous)
        engine.client = client
        engine.send_weights()
        self._engine, self._members = engine, members

    def _open(self, client: VLLMWeightSyncClient, workers: int, rendezvous: Rendezvous) -> TrainerWeightTransferEngine:
        if self._transfer == "nccl":
            address, port = rendezvous()
            init: NCCLTrainerInitInfo | IPCTrainerInitInfo = NCCLTrainerInitInfo(
                master_address=address, master_port=port, world_size=1 + workers, packed=False, rank=self._rank
            )
        else:
            init = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=self._source.buffer_bytes(), rank=self._rank)
        return WeightTransferTrainerFactory.trainer_init(init, client=client, source=self._source)
