"""New weights for a running vLLM engine, through vLLM's own weight-transfer API.

A transfer is `start`, any number of `update`s, `finish`. vLLM hands each call to a transfer engine that lives beside the model;
its `nccl` and `ipc` engines receive on GPUs, and `BucketTransfer` here takes tensors that already lie in this process (views of
an object store), which is all a CPU needs and also serves a GPU that is fed from the CPU. `WeightSyncClient` is the trainer's
side of the same API: vLLM's trainer engines drive any transport through these four methods.

Two facts about vLLM 0.32 shape `BucketTransfer`:

- Checkpoint tensors go in through a layerwise reload, which re-fuses and re-packs a layer as soon as all its parts have come. A
  layer cut in two by a bucket border is kept waiting by reference, so what is waiting is copied before the bucket goes away.
- A tied output layer owns no weights, so the reload never re-packs its GEMM on a CPU, and it would go on multiplying with the
  old embedding (2 nats of log-prob on a real model). It is packed again at the end, of vLLM's own transfers too.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from rayrlhf.weight_sync.buckets import WeightBucket


@dataclass
class BucketInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Buckets need no rendezvous."""


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One bucket, by reference: Hugging Face names and tensors of any float dtype, cast to the model's on the way in."""

    bucket: WeightBucket


class BucketTransfer(WeightTransferEngine[BucketInit, BucketUpdate]):  # type: ignore[misc]
    """Loads buckets of tensors that lie in this process's memory."""

    init_info_cls = BucketInit
    update_info_cls = BucketUpdate

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        """Nothing to connect to."""

    def start_weight_update(self) -> None:
        """Open every layer for loading."""
        # While a layer is open its parameters are placeholders, which no longer show what is tied to what.
        self._tied = _tied_heads(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: BucketUpdate) -> None:
        """Load one bucket; nothing refers to its memory afterwards."""
        self.model.load_weights(update_info.bucket)
        self._keep_waiting_tensors({tensor.untyped_storage().data_ptr() for _, tensor in update_info.bucket})

    def finish_weight_update(self) -> None:
        """Close all layers and re-pack the tied output layers.

        Raises:
            ValueError: some layer got no or not all of its weights. The engine must not sample any more.
        """
        missing = self._incomplete_layers()
        if missing:
            raise ValueError(f"weight update ended with {len(missing)} incomplete layers: {', '.join(missing[:3])}")
        finalize_layerwise_reload(self.model, self.model_config)
        for head in self._tied.values():
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Nothing to release."""

    def _keep_waiting_tensors(self, borrowed: set[int]) -> None:
        for layer in self.model.modules():
            for _, call in get_layerwise_info(layer).loaded_weights:
                for argument, value in call.arguments.items():
                    if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in borrowed:
                        call.arguments[argument] = value.clone()

    def _incomplete_layers(self) -> list[str]:
        incomplete = []
        for name, layer in self.model.named_modules():
            info = get_layerwise_info(layer)
            if not info.can_load() or name in self._tied or is_deferred_attention_layer(layer):
                continue
            expected = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
            # A vocabulary is padded up to a round number, and nothing is ever loaded for the padding.
            if info.load_numel < (1 if isinstance(layer, VocabParallelEmbedding) else expected):
                incomplete.append(name)
        return incomplete


class _TiedHeads:
    """Packs tied output layers again at the end of one of vLLM's own transfers."""

    def start_weight_update(self) -> None:
        self._tied = _tied_heads(self.model)  # type: ignore[attr-defined]
        super().start_weight_update()  # type: ignore[misc]

    def finish_weight_update(self) -> None:
        super().finish_weight_update()  # type: ignore[misc]
        for head in self._tied.values():
            head.quant_method.process_weights_after_loading(head)


class NCCLTransfer(_TiedHeads, NCCLWeightTransferEngine):  # type: ignore[misc]
    """Receives a broadcast of the policy's rank 0 (`device_transfer.py`)."""


class IPCTransfer(_TiedHeads, IPCWeightTransferEngine):  # type: ignore[misc]
    """Reads the memory of a policy rank on the same GPU (`device_transfer.py`)."""


TRANSFERS = {"shared_memory": BucketTransfer, "nccl": NCCLTransfer, "ipc": IPCTransfer}
"""By `rollout.weight_transfer`."""


class WeightSyncClient:
    """The four calls of vLLM's `VLLMWeightSyncClient` protocol, on an engine of this process."""

    def __init__(self, engine: Any) -> None:
        """Drive the transfer engine behind `engine`, an `LLMEngine` that was given a `WeightTransferConfig`."""
        self._engine = engine

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to the trainer, as the backend needs it."""
        self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})

    def start_weight_update(self) -> None:
        """Open the model for new weights."""
        self._engine.collective_rpc("start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Receive one part of the weights."""
        self._engine.collective_rpc("update_weights", kwargs={"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Make the weights current, drop what was cached from the old ones, and label what is sampled from now on.

        Unfinished requests keep their tokens; the keys and values of these are computed again from the new weights.
        """
        self._engine.collective_rpc("finish_weight_update")
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("the prefix cache still holds keys and values of the old weights")
        if weight_version is not None:
            self._engine.set_weight_version(weight_version)


def registered(transfer: str) -> str:
    """Make a transfer known to vLLM in this process; returns its name for a `WeightTransferConfig`."""
    name = f"rayrlhf_{transfer}"
    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, TRANSFERS[transfer])
    return name


def _tied_heads(model: torch.nn.Module) -> dict[str, Any]:
    """Output layers whose weight is the input embedding's, by module name."""
    vocabulary = {name: layer for name, layer in model.named_modules() if isinstance(layer, VocabParallelEmbedding)}
    inputs = {id(layer.weight) for layer in vocabulary.values() if not isinstance(layer, ParallelLMHead)}
    return {
        name: layer for name, layer in vocabulary.items() if isinstance(layer, ParallelLMHead) and id(layer.weight) in inputs
    }
