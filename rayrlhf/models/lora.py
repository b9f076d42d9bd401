"""Low-rank adapters (Hu et al. 2021): small trainable matrices on frozen linear layers.

Adapters are injected into the model in place, so every module keeps its checkpoint name. Weights leave merged: each tensor is
base + scale * B A, computed on the side. Nothing is ever merged into the base and taken out again, so it never drifts, and the
reference model is simply the same network with its adapters off.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rayrlhf.config.library_types import PreTrainedModel
from rayrlhf.config.model import LoraSection
from rayrlhf.errors import UserError

_BASE, _ADAPTERS = ".base_layer.", (".lora_A.", ".lora_B.")


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of the Hugging Face checkpoint that a network amounts to.

    Attributes:
        name: its checkpoint name.
        parameters: what `value` reads; under ZeRO-3 these must be gathered first.
        value: returns the tensor; a view of the parameter itself where no adapter sits on it, so do not write to it.
        is_buffer: whether it is a persistent buffer, which keeps its own dtype.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    value: Callable[[], Tensor]
    is_buffer: bool = False


def add_lora(network: PreTrainedModel, section: LoraSection, seed: int) -> None:
    """Inject adapters into a transformers model, in place, and freeze the rest. At the start they change nothing (B = 0).

    Args:
        network: a transformers model, with or without output layer.
        section: rank, alpha, targets, and how many of the last layers.
        seed: of the draw of A; every rank draws the same.

    Raises:
        UserError: `target_modules` names nothing in the model, or `last_layers` exceeds its layers.
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
    """Whether adapters were injected."""
    return next(_layers(network), None) is not None


@contextmanager
def adapters_disabled(network: nn.Module) -> Iterator[None]:
    """Compute without the adapters inside the block: the network is then exactly the base model. Do not nest."""
    layers = list(_layers(network))
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def checkpoint_tensors(network: nn.Module) -> Iterator[CheckpointTensor]:
    """Yield the tensors of the merged checkpoint under Hugging Face names, tied ones once, each computed when asked for."""
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
        yield CheckpointTensor(f"{prefix}.{leaf}", tuple(layer.parameters()), _folded(layer, parameter))
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
    """Names of the modules to adapt, or their ends; `all-linear` is every linear layer but the output layer."""
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
    """Number of the decoder layer that a module lies in; None for what lies in none."""
    return next((int(part) for part in name.split(".")[:-1] if part.isdecimal()), None)
