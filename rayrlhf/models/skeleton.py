"""Checks of a model from its configuration alone: adapted layers and memory of its weights."""

from collections.abc import Mapping
from functools import lru_cache

import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.section import GIB
from rayrlhf.errors import UserError
from rayrlhf.library_types import PreTrainedModel
from rayrlhf.models.load import load_architecture
from rayrlhf.models.lora import check_targets

FLOAT = 4
"""Bytes of a float32."""


def skeleton(model: ModelSection) -> PreTrainedModel | None:
    """Build a causal language model on the `meta` device, without memory.

    Returns:
        The network; None for an architecture that transformers cannot build this way.

    Raises:
        UserError: the path cannot be loaded.
    """
    return _skeleton(model.model_dump_json(include={"path", "revision", "trust_remote_code"}))


@lru_cache(maxsize=8)
def _skeleton(described: str) -> PreTrainedModel | None:
    from transformers import AutoModelForCausalLM

    model = ModelSection.model_validate_json(described)
    architecture = load_architecture(model)
    try:
        with torch.device("meta"):
            network: PreTrainedModel = AutoModelForCausalLM.from_config(architecture, trust_remote_code=model.trust_remote_code)
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
    """Check `lora.target_modules` before weights load.

    Raises:
        UserError: see `check_targets`.
    """
    network = skeleton(model) if model.lora is not None else None
    if model.lora is not None and network is not None:
        check_targets(network, model.lora)


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
