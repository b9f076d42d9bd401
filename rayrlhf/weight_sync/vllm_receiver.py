"""A vLLM engine's end of all weight transfers, through vLLM's own weight-transfer API.

A transfer is `start`, any number of `update`s, `finish`. vLLM passes each call to a transfer engine in the model's process. Its
`nccl` and `ipc` engines receive on GPUs. `BucketTransfer` takes tensors that are in this process already (views of the object
store), for engines on the CPU and for GPUs that are fed from the CPU; vLLM copies them to the workers of a tensor-parallel
replica. `WeightSyncClient` is the trainer's side of the same API:
vLLM's trainer engines drive any transport through these four methods.

Facts about vLLM 0.32 that shape the transfers:

- Checkpoint tensors are loaded by a layerwise reload, which re-fuses and re-packs a layer once all its parts have arrived. It
  keeps references to the parts of a layer that two buckets share, so these are copied before the bucket is freed.
- A tied output layer owns no weights, so the reload never re-packs its GEMM on a CPU, and it would keep multiplying with the
  old embedding (2 nats of log-prob on a real model). It is packed again at the end, also of vLLM's own transfers.
- The CPU kernel of experts packs its weights when it is created, which vLLM does on the first load only. Later loads would put
  unpacked numbers in their place (0.5 nats on a tiny model), so every load creates the kernel again.
- Mixtral's loader does not know the module names of transformers 5.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)
from vllm.model_executor.models.mixtral import MixtralForCausalLM
from vllm.platforms import current_platform

from rayrlhf.weight_sync.buckets import WeightBucket

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


@dataclass
class BucketInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Buckets need no rendezvous."""


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One bucket by reference; tensors of any float dtype are cast to the model's."""

    bucket: WeightBucket


class BucketTransfer(WeightTransferEngine[BucketInit, BucketUpdate]):  # type: ignore[misc]
    """Loads buckets of tensors that are in this process's memory."""

    init_info_cls = BucketInit
    update_info_cls = BucketUpdate

    def init_transfer_engine(self, init_info: BucketInit) -> None:
        """Do nothing: there is no connection."""

    def start_weight_update(self) -> None:
        """Prepare every layer for loading."""
        # During loading the parameters are placeholders, which no longer show which layers are tied.
        self._tied = _tied_heads(self.model)
        _prepare_experts(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: BucketUpdate) -> None:
        """Load one bucket; no reference to its memory is kept."""
        self.model.load_weights(update_info.bucket)
        self._keep_waiting_tensors({tensor.untyped_storage().data_ptr() for _, tensor in update_info.bucket})

    def finish_weight_update(self) -> None:
        """Finish all layers and re-pack the tied output layers.

        Raises:
            ValueError: a layer did not receive all of its weights. The engine must not generate any more.
        """
        missing = self._incomplete_layers()
        if missing:
            raise ValueError(f"weight update ended with {len(missing)} incomplete layers: {', '.join(missing[:3])}")
        finalize_layerwise_reload(self.model, self.model_config)
        for head in self._tied.values():
            head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        """Do nothing: there is nothing to release."""

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
            # The vocabulary is padded to a round number, and nothing is ever loaded for the padding.
            if info.load_numel < (1 if isinstance(layer, VocabParallelEmbedding) else expected):
                incomplete.append(name)
        return incomplete


class _Repacked:
    """Re-packs experts and tied output layers in one of vLLM's own transfers."""

    def start_weight_update(self) -> None:
        self._tied = _tied_heads(self.model)  # type: ignore[attr-defined]
        _prepare_experts(self.model)  # type: ignore[attr-defined]
        super().start_weight_update()  # type: ignore[misc]

    def finish_weight_update(self) -> None:
        super().finish_weight_update()  # type: ignore[misc]
        for head in self._tied.values():
            head.quant_method.process_weights_after_loading(head)


class NCCLTransfer(_Repacked, NCCLWeightTransferEngine):  # type: ignore[misc]
    """Receives a broadcast of the policy's rank 0 (`vllm_sender.py`)."""


class IPCTransfer(_Repacked, IPCWeightTransferEngine):  # type: ignore[misc]
    """Reads the memory of a policy rank on the same GPU (`vllm_sender.py`)."""


class WeightSyncClient:
    """The four calls of vLLM's `VLLMWeightSyncClient` protocol, on an engine of this process."""

    def __init__(self, engine: "LLMEngine") -> None:
        """Drive the transfer engine of an `LLMEngine` with a `WeightTransferConfig`."""
        self._engine = engine

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to the trainer."""
        self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})

    def start_weight_update(self) -> None:
        """Prepare the model for new weights."""
        self._engine.collective_rpc("start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Receive one part of the weights."""
        self._engine.collective_rpc("update_weights", kwargs={"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Make the weights current, see `activate`.

        Unfinished requests keep their tokens, whose keys and values are recomputed.
        """
        self._engine.collective_rpc("finish_weight_update")
        self.activate(weight_version)

    def activate(self, weight_version: str | None = None) -> None:
        """Drop the prefix cache and label new tokens with a weight version.

        Raises:
            RuntimeError: vLLM did not drop the cache.
        """
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("the prefix cache still holds keys and values of the old weights")
        if weight_version is not None:
            self._engine.set_weight_version(weight_version)


def _tied_heads(model: torch.nn.Module) -> dict[str, ParallelLMHead]:
    """Return the output layers that share the input embedding's weight, by module name."""
    vocabulary = {name: layer for name, layer in model.named_modules() if isinstance(layer, VocabParallelEmbedding)}
    inputs = {id(layer.weight) for layer in vocabulary.values() if not isinstance(layer, ParallelLMHead)}
    return {
        name: layer for name, layer in vocabulary.items() if isinstance(layer, ParallelLMHead) and id(layer.weight) in inputs
    }


def _prepare_experts(model: torch.nn.Module) -> None:
    """Prepare the experts for a load.

    Their CPU kernels are created again, and Mixtral understands the names of transformers.
    """
    if current_platform.is_cpu():
        for layer in model.modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, UnquantizedFusedMoEMethod):
                method.moe_kernel = None
    if isinstance(model, MixtralForCausalLM) and "load_weights" not in vars(model):
        model.load_weights = _renamed(model.load_weights)


def _renamed(load: Callable[..., set[str]]) -> Callable[..., set[str]]:
    def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load(part for name, tensor in weights for part in _mixtral_parts(name, tensor))

    return load_weights


def _mixtral_parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Split fused experts into Mixtral's published tensors.

    `gate_up_proj` is [E, 2I, H], `down_proj` [E, H, I].
    """
    name = name.replace(".mlp.", ".block_sparse_moe.")
    prefix, _, leaf = name.rpartition(".experts.")
    parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}.get(leaf)
    if parts is None:
        yield name, tensor
        return
    for expert, weights in enumerate(tensor):
        for part, weight in zip(parts, weights.chunk(len(parts)), strict=True):
            yield f"{prefix}.experts.{expert}.{part}.weight", weight
