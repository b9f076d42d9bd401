"""Parameters that are stacked from several tensors of a checkpoint, such as experts.

transformers 5 holds all experts of a layer in one parameter, and published checkpoints have a tensor for each. Its conversion
mapping names them, for loads and for exports.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from rayrlhf.library_types import PreTrainedModel
from rayrlhf.models.tensor_files import TensorKind, TensorStream

Sources = tuple[tuple[str, ...], ...]
"""Names of a parameter's tensors in the files: for each part of its dimension 1, one per row of dimension 0.

A parameter that is stored as it is has one part with one name.
"""


class OtherConversionError(Exception):
    """A tensor of the files is converted in another way than by stacking."""


def sources_by_parameter(network: PreTrainedModel, files: Iterable[str]) -> dict[str, Sources]:
    """Return the tensors of each parameter or buffer by its name.

    A name that transformers does not convert is its own.

    Args:
        network: the model, whose family has the conversion mapping.
        files: names of all tensors of the files.

    Raises:
        OtherConversionError: transformers computes a parameter from several tensors in another way.
    """
    from transformers.core_model_loading import rename_source_key

    converters, renamings = _mapping(network)
    patterns = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in files:
        target, pattern = rename_source_key(name, renamings, converters)
        if pattern is not None and not _stacks(patterns[pattern].operations):
            raise OtherConversionError(name)
        found[target][pattern or ""].append(name)
    order = {pattern: place for place, pattern in enumerate(patterns)}
    return {
        target: tuple(
            tuple(sorted(parts[pattern], key=_numbers)) for pattern in sorted(parts, key=lambda one: order.get(one, -1))
        )
        for target, parts in found.items()
    }


def only_stacks(network: PreTrainedModel) -> bool:
    """Return True if every parameter is a tensor of the files, or stacked from some."""
    return all(_stacks(converter.operations) for converter in _mapping(network)[0])


def unstacked(network: PreTrainedModel, stream: TensorStream) -> TensorStream:
    """Return the tensors of a checkpoint under the names that transformers saves.

    Args:
        network: a model that `only_stacks`.
        stream: its parameters under their own names.
    """
    converters, renamings = (
        [one.reverse_transform() for one in reversed(kind) if type(one).__name__ != "PrefixChange"]
        for kind in _mapping(network)
    )

    def renamed(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    def names_of(name: str, experts: int) -> list[list[str]]:
        for converter in converters:
            key, matched = converter.rename_source_key(name)
            if matched is not None:
                parts = [key.replace(converter.target_patterns[0], part, 1) for part in converter.target_patterns]
                return [[renamed(part.replace("*", str(number))) for part in parts] for number in range(experts)]
        return []

    kinds: dict[str, TensorKind] = {}
    stacks: dict[str, list[list[str]]] = {}
    for name, kind in stream.kinds.items():
        stacks[name] = names_of(name, kind.shape[0] if kind.shape else 0)
        for parts in stacks[name]:
            shape = torch.Size([kind.shape[1] // len(parts), *kind.shape[2:]])
            kinds |= dict.fromkeys(parts, TensorKind(shape, kind.dtype))
        if not stacks[name]:
            kinds[renamed(name)] = kind

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream.tensors:
            experts = stacks.get(name, [])
            if not experts:
                yield renamed(name), tensor
            for parts, expert in zip(experts, tensor, strict=False):
                yield from zip(parts, expert.chunk(len(parts)), strict=True)

    return TensorStream(kinds, tensors())


def stacked_shape(shapes: list[list[list[int]]]) -> list[int]:
    """Return the shape of a stacked parameter, empty if its tensors do not fit."""
    first = [part[0] for part in shapes]
    same_length = all(len(part) == len(shapes[0]) for part in shapes)
    if not same_length or any(shape != part[0] for part in shapes for shape in part):
        return []
    if any(not shape or shape[1:] != first[0][1:] for shape in first):
        return []
    return [len(shapes[0]), sum(shape[0] for shape in first), *first[0][1:]]


def copy_stacked(value: Tensor, rows: slice, parts: list[list[Any]]) -> None:
    """Copy rows of dimension 0 from their tensors, one at a time.

    Args:
        value: the parameter, of shape [experts, ...].
        rows: of the tensors that are read.
        parts: slices of the files, by part and expert.
    """
    for number in range(value.shape[0])[rows]:
        start = 0
        for part in parts:
            tensor: Tensor = part[number][:]
            value[number, start : start + len(tensor)].copy_(tensor)
            start += len(tensor)


def _mapping(network: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """Return transformers' conversions of a family from tensors of the files, and its renamings."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    mapping = get_model_conversion_mapping(network, add_legacy=False)
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    return converters, [one for one in mapping if not isinstance(one, WeightConverter)]


def _stacks(operations: list[Any]) -> bool:
    """Return True for a stack over experts, also with parts joined along dimension 1."""
    kinds = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in operations]
    return kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def _numbers(name: str) -> list[int]:
    """Return the numbers of a name, which order experts as transformers does."""
    return [int(number) for number in re.findall(r"\d+", name)]
