"""New weights from GPU to GPU: the trainer's end of vLLM's `nccl` and `ipc` transfers.

`nccl` broadcasts from rank 0 of the policy to replicas on other devices. `ipc` lets a replica read the memory of a policy rank
on its own device, buffer by buffer. vLLM's trainer engines drive both through the four calls of a client; what is ours is what
they send (`EngineSource`), and that the group is opened anew whenever the replicas are not those of last time (`DeviceSender`),
since a communicator cannot gain or lose a member.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

DeviceTransfer = Literal["nccl", "ipc"]
BUFFER_BYTES = 256 * 2**20
"""Device memory that `ipc` lends at a time, at least."""


class EngineSource(WeightSource):  # type: ignore[misc]
    """The weights of a train engine, one tensor at a time; every pass is a collective of all ranks.

    Args:
        tensors: begins a new pass over (Hugging Face name, tensor on the device).
    """

    def __init__(self, tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
        self._tensors = tensors
        self._metadata: list[ParamMeta] = []

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and shapes, which one pass shows; they never change."""
        if not self._metadata:
            self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors()]
        return self._metadata

    def buffer_bytes(self) -> int:
        """What has to be lent at a time: `BUFFER_BYTES`, or the largest tensor, which vLLM does not cut."""
        sizes = (math.prod(one.shape) * one.dtype.itemsize for one in self.metadata())
        return int(max(BUFFER_BYTES, *sizes))

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Begin a new pass."""
        return self._tensors()


class DeviceSender:
    """One policy rank's end of a transfer.

    Args:
        transfer: which of vLLM's.
        rank: of this process among the policy's; rank 0 sends, the others help to gather.
        source: the weights.
    """

    def __init__(self, transfer: DeviceTransfer, rank: int, source: EngineSource) -> None:
        self._transfer = transfer
        self._rank = rank
        self._source = source
        self._members: tuple[str, ...] = ()
        self._engine: Any = None

    def send(self, client: Any, members: tuple[str, ...], workers: int, meeting: Callable[[], tuple[str, int]]) -> None:
        """Bring the weights to all replicas; every rank must be called.

        Args:
            client: vLLM's `VLLMWeightSyncClient`, which speaks to the replicas.
            members: who they are; another process at the same place must have another name.
            workers: processes of all of them together.
            meeting: address and free port of this process, asked for when a group is opened.

        What the client raises ends the call; the group is left then, and the next call opens another.
        """
        # Forgotten until all went well, and not closed otherwise: a communicator whose peers are gone may wait for them.
        engine, self._engine = self._engine, None
        if engine is None or members != self._members:
            if engine is not None:
                engine.shutdown()
            engine = self._opened(client, workers, meeting)
        engine.client = client
        engine.send_weights()
        self._engine, self._members = engine, members

    def _opened(self, client: Any, workers: int, meeting: Callable[[], tuple[str, int]]) -> Any:
        if self._transfer == "nccl":
            address, port = meeting()
            init: Any = NCCLTrainerInitInfo(
                master_address=address, master_port=port, world_size=1 + workers, packed=False, rank=self._rank
            )
        else:
            init = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=self._source.buffer_bytes(), rank=self._rank)
        return WeightTransferTrainerFactory.trainer_init(init, client=client, source=self._source)
