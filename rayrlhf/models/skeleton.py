"""Checks of a model from its configuration alone: adapters, memory, groups of ranks."""

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rank_groups import RankGroups
from rayrlhf.config.section import GIB
from rayrlhf.errors import UserError
from rayrlhf.library_types import PretrainedConfig, PreTrainedModel
from rayrlhf.models.expert_parallel import expert_obstacle
from rayrlhf.models.held_weights import holdable
from rayrlhf.models.load import checkpoint_dtype, load_architecture
from rayrlhf.models.lora import check_targets
from rayrlhf.models.tensor_parallel import obstacle

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
    except (ValueError, ImportError, AttributeError, KeyError, TypeError):
        return None
    return network


def parameter_count(model: ModelSection) -> int:
    """Return the number of parameters, tied ones once; 0 if unknown."""
    network = skeleton(model)
    return 0 if network is None else sum(parameter.numel() for parameter in network.parameters())


def exported_bytes(model: ModelSection) -> int:
    """Return the bytes of the model's weights in its checkpoint's dtype; 0 if unknown."""
    return checkpoint_dtype(model).itemsize * parameter_count(model)


def least_training_bytes(model: ModelSection, *, states: int = 2) -> int:
    """Return the bytes of a trained model without activations and adapters.

    They are float32 weights, gradients and optimizer states, or the frozen weights under adapters in the checkpoint's dtype.

    Args:
        model: the model.
        states: float32 optimizer states per parameter: 2 for Adam, 0 for SGD.
    """
    network = skeleton(model)
    if model.lora is None or network is None:
        return FLOAT * parameter_count(model) * (2 + states)
    held = sum(parameter.numel() for parameter in holdable(network).values())
    return FLOAT * parameter_count(model) - (FLOAT - checkpoint_dtype(model).itemsize) * held


def check_adapters(model: ModelSection) -> None:
    """Check `lora.target_modules` before weights load.

    Raises:
        UserError: see `check_targets`.
    """
    network = skeleton(model) if model.lora is not None else None
    if model.lora is not None and network is not None:
        check_targets(network, model.lora)


def check_rank_groups(model: ModelSection, key: str, groups: RankGroups) -> None:
    """Check, before weights load, that ranks can share a model's rows, weights or experts.

    Args:
        model: the model.
        key: section of the groups, for the message.
        groups: sizes of groups of ranks.

    Raises:
        UserError: they cannot.
    """
    check_row_split(model, f"{key}.sequence_parallel", groups.sequence_parallel)
    check_weight_split(model, f"{key}.tensor_parallel", groups.tensor_parallel)
    check_weight_split(model, f"{key}.expert_parallel", groups.expert_parallel, expert_obstacle)


def check_row_split(model: ModelSection, key: str, size: int) -> None:
    """Check, before weights load, that a model's rows can be split over ranks.

    Args:
        model: the model.
        key: of the setting, for the message.
        size: its value; 1 splits nothing.

    Raises:
        UserError: they cannot be split.
    """
    if size == 1:
        return
    if model.attention != "sdpa":
        raise UserError(f"{key} {size} with model.attention '{model.attention}': expected 'sdpa'")
    network = skeleton(model)
    obstacle = None if network is None else _obstacle(network, network.config.get_text_config())
    if network is not None and obstacle is not None:
        raise UserError(
            f"{key} {size}: a {network.config.model_type} model ({model.path}) {obstacle}, which needs whole rows on a rank; "
            "expected 1"
        )


def check_weight_split(
    model: ModelSection, key: str, size: int, find_obstacle: Callable[[PreTrainedModel, int], str | None] = obstacle
) -> None:
    """Check, before weights load, that they can be split over ranks.

    See `check_row_split` for the other arguments.

    Args:
        find_obstacle: returns why not.

    Raises:
        UserError: they cannot be split.
    """
    network = None if size == 1 else skeleton(model)
    reason = None if network is None else find_obstacle(network, size)
    if network is not None and reason is not None:
        raise UserError(f"{key} {size}: a {network.config.model_type} model ({model.path}) {reason}")


def _obstacle(network: PreTrainedModel, text: PretrainedConfig) -> str | None:
    """Return why the columns of a row cannot be computed on different ranks, or None."""
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if getattr(network, "_is_stateful", False) or kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        return "has linear attention or state-space layers"
    windowed = getattr(text, "sliding_window", None) is not None or getattr(text, "attention_chunk_size", None) is not None
    if windowed or kinds != {"full_attention"}:
        return "has sliding-window attention"
    rope = getattr(text, "rope_parameters", None) or {}
    if {rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))} & {
        "dynamic",
        "longrope",
    }:
        return "has rotary frequencies that depend on the longest sample"
    if not getattr(network, "_supports_attention_backend", False):
        return "has an attention of its own"
    return None


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
