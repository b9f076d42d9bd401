"""Checks of a model from its configuration alone: adapted layers and memory of its weights."""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import nn

from rayrlhf.config.model import ModelSection
from rayrlhf.config.section import GIB
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_architecture

FLOAT = 4
"""Bytes of a float32."""


def skeleton(model: ModelSection) -> nn.Module | None:
    """Build a causal language model on the `meta` device, without memory.

    Returns:
        The network; None for an architecture that transformers cannot build this way.

    Raises:
        UserError: the path cannot be loaded.
    """
    return _skeleton(model.model_dump_json(include={"path", "revision", "trust_remote_code"}))


@lru_cache(maxsize=8)
def _skeleton(described: str) -> nn.Module | None:
    from transformers import AutoModelForCausalLM

    model = ModelSection.model_validate_json(described)
    architecture = load_architecture(model)
    try:
        with torch.device("meta"):
            network: nn.Module = AutoModelForCausalLM.from_config(architecture, trust_remote_code=model.trust_remote_code)
    except (ValueError, ImportError, AttributeError):
        return None
    return network


def parameter_count(model: ModelSection) -> int:
    """Return the number of parameters, tied ones once; 0 if unknown."""
    network = skeleton(model)
    return 0 if network is None else sum(parameter.numel() for parameter in network.parameters())


def least_training_bytes(model: ModelSection, *, states: int = 2) -> int:
    """Return the bytes of a trained model without activations and adapters.

    They are float32 weights, and, unless only adapters are trained, gradients and optimizer states.

    Args:
        model: the model.
        states: float32 optimizer states per parameter: 2 for Adam, 0 for SGD.
    """
    return FLOAT * parameter_count(model) * (1 if model.lora is not None else 2 + states)


def check_adapters(model: ModelSection) -> None:
    """Check `lora.target_modules` against the model's linear layers.

    Raises:
        UserError: the model has no layer of one of these names.
    """
    if model.lora is None or not isinstance(model.lora.target_modules, list):
        return
    from transformers.pytorch_utils import Conv1D

    network = skeleton(model)
    if network is None:
        return
    names = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    absent = [target for target in model.lora.target_modules if not any(f".{name}".endswith(f".{target}") for name in names)]
    if absent:
        leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        raise UserError(f"model.lora.target_modules: no linear layer {absent[0]!r} in {model.path}; it has {leaves}")


def check_memory(parts: Mapping[str, int], limit: int, changes: Mapping[str, int]) -> None:
    """Check that models fit into memory.

    Args:
        parts: bytes by role, a lower bound.
        limit: bytes of this machine or container.
        changes: bytes in total by settings that reduce them, the smallest change first.

    Raises:
        UserError: they do not fit; names the first change that does.
    """
    total = sum(parts.values())
    if total <= limit:
        return
    shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    fitting = next((change for change, size in changes.items() if size <= limit), None)
    advice = f"smallest change that fits: {fitting}" if fitting else "no setting makes it fit; choose a smaller model"
    raise UserError(
        f"memory: the models need at least {total / GIB:.1f} GiB ({shown}), this machine has {limit / GIB:.1f} GiB; {advice}"
    )
