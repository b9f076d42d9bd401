"""Low-rank adapters (Hu et al. 2021): small trainable matrices on frozen linear layers.

Adapters are injected into the model in place, so every module keeps its checkpoint name. Exported weights are merged: each
tensor is base + scale * B A, computed separately. Adapters are never merged into the base in place, so it does not drift, and
the reference model is the same network with its adapters disabled.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rayrlhf.config.model import LoraSection
from rayrlhf.errors import UserError
from rayrlhf.library_types import PreTrainedModel

_BASE, _ADAPTERS = ".base_layer.", (".lora_A.", ".lora_B.")


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of the merged Hugging Face checkpoint of a network.

    Attributes:
        name: checkpoint name.
        parameters: parameters that `value` reads; sharded ones must be gathered first.
        value: returns the tensor; a view of the parameter itself if it has no adapter, so do not write to it.
        is_buffer: a persistent buffer, which keeps its own dtype.
        base: the frozen weight under an adapter.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    value: Callable[[], Tensor]
    is_buffer: bool = False
    base: nn.Parameter | None = None


def add_lora(network: PreTrainedModel, section: LoraSection, seed: int) -> None:
    """Inject adapters into a transformers model, in place, and freeze the rest.

    Initially they change nothing (B = 0).

    Args:
        network: a transformers model, with or without output layer.
        section: rank, alpha, targets, and number of last layers.
        seed: of the draw of A; every rank draws the same.

    Raises:
        UserError: `target_modules` matches nothing in the model, or `last_layers` exceeds its layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=_targets(network, section),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, network)
        except ValueError as error:
            raise UserError(
                f"model.lora.target_modules {section.target_modules!r}: no such modules in {type(network).__name__}"
            ) from error


def has_lora(network: nn.Module) -> bool:
    """Return True if adapters were injected."""
    return next(_layers(network), None) is not None


@contextmanager
def adapters_disabled(network: nn.Module) -> Iterator[None]:
    """Disable the adapters inside the block, which gives exactly the base model.

    Do not nest.
    """
    layers = list(_layers(network))
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def checkpoint_tensors(network: nn.Module) -> Iterator[CheckpointTensor]:
    """Yield the tensors of the merged checkpoint by Hugging Face name, tied ones once.

    Each is computed when its `value` is called.
    """
    for name, parameter in network.named_parameters():
        if any(part in name for part in _ADAPTERS):
            continue
        if _BASE not in name:
            yield CheckpointTensor(name, (parameter,), parameter.detach)
            continue
        prefix, _, leaf = name.rpartition(_BASE)
        if leaf != "weight":
            yield CheckpointTensor(f"{prefix}.{leaf}", (parameter,), parameter.detach)
            continue
        layer = network.get_submodule(prefix)
        yield CheckpointTensor(f"{prefix}.{leaf}", tuple(layer.parameters()), _folded(layer, parameter), base=parameter)
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    for name, value in network.state_dict(keep_vars=True).items():
        # Persistent buffers are part of the model too: a router's score correction, the bounds of an activation.
        if name not in parameters:
            yield CheckpointTensor(name.replace(_BASE, "."), (), value.detach, is_buffer=True)


def _folded(layer: Any, base: nn.Parameter) -> Callable[[], Tensor]:
    def value() -> Tensor:
        with torch.no_grad():
            total = base.detach()
            for adapter in layer.active_adapters:
                total = total + layer.get_delta_weight(adapter).to(total.dtype)
            return total

    return value


def _layers(network: nn.Module) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in network.modules() if isinstance(module, BaseTunerLayer))


def _targets(network: PreTrainedModel, section: LoraSection) -> list[str]:
    """Return names of the modules to adapt, or their suffixes.

    `all-linear` is every linear layer except the output layer.
    """
    from transformers.pytorch_utils import Conv1D

    ends = section.target_modules
    if ends == "all-linear":
        output_layer = network.get_output_embeddings()
        linear = (nn.Linear, Conv1D)
        names = {name for name, module in network.named_modules() if isinstance(module, linear) and module is not output_layer}
        ends = sorted({name.rpartition(".")[2] for name in names})
    if section.last_layers is None:
        return ends
    total = int(network.config.num_hidden_layers)
    if section.last_layers > total:
        raise UserError(f"model.lora.last_layers {section.last_layers}: the model has {total} layers")
    # PEFT's own choice of layers finds none in a model without output layer, whose names begin with `layers`.
    layers = range(total - section.last_layers, total)
    named = [name for name, _ in network.named_modules() if _layer_of(name) in layers]
    return [name for name in named if any(f".{name}".endswith(f".{end}") for end in ends)]


def _layer_of(name: str) -> int | None:
    """Return the index of the decoder layer that contains a module, or None."""
    return next((int(part) for part in name.split(".")[:-1] if part.isdecimal()), None)
