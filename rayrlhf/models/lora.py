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
from rayrlhf.models.load_check import probe_samples
from rayrlhf.models.tensor_parallel import whole_shape

_EXPERT_PROJECTIONS = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate", "router"})
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

    @property
    def shape(self) -> torch.Size:
        """Shape of the value, known without gathering it."""
        return self.value().shape if self.source is None else whole_shape(self.source)

    @property
    def source(self) -> nn.Parameter | None:
        """The parameter that the value replaces; None for a buffer."""
        return self.base if self.base is not None else next(iter(self.parameters), None)


def add_lora(network: PreTrainedModel, section: LoraSection, seed: int) -> None:
    """Inject adapters into a transformers model, in place, and freeze the rest.

    Initially they change nothing (B = 0).

    Args:
        network: a transformers model, with or without output layer.
        section: rank, alpha, targets, and number of last layers.
        seed: of the draw of A; every rank draws the same.

    Raises:
        UserError: see `check_targets`; also `last_layers` that exceeds the model's layers, and modules whose weights the model
            reads without calling them.
    """
    from peft import LoraConfig, inject_adapter_in_model

    check_targets(network, section)
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=_targets(network, section),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with _wide_weights(network):
                inject_adapter_in_model(config, network)
        except ValueError as error:  # modules whose weights a fused kernel reads
            reason = str(error).removeprefix("[PEFT:PeftType.LORA] ").partition(". ")[0]
            raise UserError(f"model.lora.target_modules: {reason}") from error
    _check_reached(network)


@contextmanager
def _wide_weights(network: PreTrainedModel) -> Iterator[None]:
    """Show float32 weights without memory to PEFT, which gives adapters the dtype of their base."""
    own = {module: module._parameters["weight"] for module in _linear_layers(network).values()}
    try:
        for module, weight in own.items():
            if weight is not None and not weight.is_meta:
                shape = getattr(weight, "ds_shape", weight.shape)
                module._parameters["weight"] = nn.Parameter(weight.new_zeros((), dtype=torch.float32).expand(shape), False)
        yield
    finally:
        for module, weight in own.items():
            module._parameters["weight"] = weight


def _check_reached(network: PreTrainedModel) -> None:
    """Check that a forward pass reads the adapters; a model without weights is not checked.

    Raises:
        UserError: all modules of a name are passed by, because the model reads their weights directly.
    """
    if network.device.type == "meta":
        return
    factors = {name: parameter for name, parameter in network.named_parameters() if ".lora_B." in name}
    sample = probe_samples(network)[0][None]
    with torch.enable_grad():
        output = network(input_ids=sample, use_cache=False)[0]
        gradients = torch.autograd.grad(output.float().square().mean(), list(factors.values()), allow_unused=True)
    reached: dict[str, bool] = {}
    for name, gradient in zip(factors, gradients, strict=True):
        # A single expert may get no token here, so only names without any gradient count.
        leaf = name.partition(".lora_B.")[0].rpartition(".")[2]
        reached[leaf] = reached.get(leaf, False) or gradient is not None
    passed_by = [leaf for leaf, used in reached.items() if not used]
    if passed_by:
        raise UserError(
            f"model.lora.target_modules: a {network.config.model_type} model reads the weights of {', '.join(passed_by)} "
            "directly, so that adapters there would not learn; name the other layers"
        )


def check_targets(network: PreTrainedModel, section: LoraSection) -> None:
    """Check the modules to adapt; the model may be on the `meta` device.

    Raises:
        UserError: one of `target_modules` is no linear layer, or the embedding or the output layer, whose products are computed
            without their modules.
    """
    if section.target_modules == "all-linear":
        return
    apart = [network.get_input_embeddings(), network.get_output_embeddings()]
    linear = _linear_layers(network)
    for target in section.target_modules:
        if any(_is_named(name, target) and any(module is other for other in apart) for name, module in network.named_modules()):
            raise UserError(
                f"model.lora.target_modules: {target!r} is the embedding or the output layer of {type(network).__name__}, "
                "expected linear layers between them"
            )
        if not any(_is_named(name, target) for name in linear):
            leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name, module in linear.items() if module not in apart))
            raise UserError(
                f"model.lora.target_modules: no linear layer {target!r} in {type(network).__name__}; it has {leaves}"
            )


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
            total = base.detach().float()
            for adapter in layer.active_adapters:
                total = total + layer.get_delta_weight(adapter).to(total.dtype)
            return total

    return value


def _layers(network: nn.Module) -> Iterator[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in network.modules() if isinstance(module, BaseTunerLayer))


def _targets(network: PreTrainedModel, section: LoraSection) -> list[str]:
    """Return the names of the modules to adapt.

    `all-linear` is every linear layer except the output layer.
    """
    output_layer = network.get_output_embeddings()
    names = [name for name, module in _linear_layers(network).items() if module is not output_layer]
    if section.target_modules != "all-linear":
        names = [name for name in names if any(_is_named(name, target) for target in section.target_modules)]
    if section.last_layers is None:
        return names
    total = int(network.config.num_hidden_layers)
    if section.last_layers > total:
        raise UserError(f"model.lora.last_layers {section.last_layers}: the model has {total} layers")
    return [name for name in names if _layer_of(name) in range(total - section.last_layers, total)]


def _linear_layers(network: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the layers that can be adapted, by name.

    Where experts are stacked in one parameter, PEFT takes the names of their projections for that parameter, which cannot be
    merged here; dense layers of these names are left out too.
    """
    from transformers.pytorch_utils import Conv1D

    stacked = any(".experts." in name and parameter.dim() == 3 for name, parameter in network.named_parameters())
    apart = _EXPERT_PROJECTIONS if stacked else frozenset()
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.rpartition(".")[2] not in apart
    }


def _is_named(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _layer_of(name: str) -> int | None:
    """Return the index of the decoder layer that contains a module, or None."""
    return next((int(part) for part in name.split(".")[:-1] if part.isdecimal()), None)
