"""Loading of safetensors into place, one tensor at a time.

The network is built without memory, then every tensor is copied from the mapped file into its parameter. No state dict is held,
and no second copy of any weight. Experts are stacked in place, one tensor at a time. Other checkpoints go through
`from_pretrained`: pickled files, quantized weights, families whose weights transformers computes on load, remote code.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError
from rayrlhf.library_types import PretrainedConfig, PreTrainedModel
from rayrlhf.models.held_weights import HALVES, holdable, widen_in_use
from rayrlhf.models.stacked_weights import OtherConversionError, copy_stacked, sources_by_parameter, stacked_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes that float32 holds exactly, by their names in safetensors."""


class WeightShards(Protocol):
    """Division of weights over ranks, applied to each weight as soon as it is read.

    Attributes:
        device: of this rank's part.
    """

    device: torch.device

    def own_rows(self, shape: torch.Size) -> slice:
        """Return the rows (of dimension 0) that this rank's part of a weight needs."""
        ...

    def settle(self, parameter: nn.Parameter) -> None:
        """Keep this rank's part of a parameter, in place.

        Other rows than its own are undefined.
        """
        ...

    def narrow(self, parameter: nn.Parameter, part: Callable[[Tensor], Tensor], group: "ProcessGroup") -> None:
        """Replace a parameter in place by a part of it, divided over a group alone."""
        ...

    def in_use(self, network: nn.Module) -> AbstractContextManager[None]:
        """Give every module its whole parameters while it computes.

        Every rank makes the same calls.
        """
        ...


class NotDirectError(Exception):
    """Reason why a checkpoint is not read in place."""


class _Use(NamedTuple):
    """A parameter or persistent buffer under one of its names."""

    name: str
    module: nn.Module
    attribute: str


def load_directly(
    auto_class: Any,
    model: ModelSection,
    path: str,
    architecture: PretrainedConfig,
    *,
    frozen: bool,
    shards: WeightShards | None,
) -> PreTrainedModel:
    """Build a network and read its weights into place.

    Args:
        auto_class: transformers' class that chooses the architecture.
        model: revision and attention.
        path: folder or hub name.
        architecture: the model's configuration; changed as `from_config` does.
        frozen: no weight is trained; those that can be are held in the dtype of the file (`held_weights`), others in float32.
        shards: keep this rank's part of each parameter only.

    Returns:
        The network in evaluation mode, on the CPU or the device of the shards. `unused_weights` are the tensors that only the
        files have.

    Raises:
        UserError: a weight holds NaN or infinite numbers.
        NotDirectError: the checkpoint has to go through `from_pretrained`.
    """
    if getattr(architecture, "auto_map", None):
        raise NotDirectError("remote code")
    files = _find_files(path, model.revision)
    with _parameters_without_memory():
        network: PreTrainedModel = auto_class.from_config(
            architecture, attn_implementation=model.attention, dtype=torch.float32
        )
    try:
        made_of = sources_by_parameter(network, files)
    except OtherConversionError as error:
        raise NotDirectError(f"transformers converts {error} of {network.config.model_type} models") from error
    places = _match(network, made_of)
    narrow = holdable(network) if frozen else {}
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in sorted(set(files.values()))}
        for name, uses in sorted(places.items(), key=lambda place: files[made_of[place[0]][0][0]]):
            tensors = [[(source, opened[files[source]]) for source in part] for part in made_of[name]]
            _place(model.path, tensors, uses, frozen=frozen, narrow=narrow, shards=shards)
    widen_in_use(network)
    ignored = [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", *(network._keys_to_ignore_on_load_unexpected or ())]
    network.unused_weights = [
        source
        for name in made_of.keys() - places.keys()
        if not any(re.search(pattern, name) for pattern in ignored)
        for part in made_of[name]
        for source in part
    ]
    if network.can_generate():
        network.adjust_generation_fn(
            None, True, None, path, cache_dir=None, force_download=False, proxies=None, local_files_only=False, token=None,
            revision=model.revision, subfolder="", trust_remote_code=False,
        )  # fmt: skip
    return network.eval()


def _find_files(path: str, revision: str | None) -> dict[str, str]:
    """Return the safetensors file of each tensor.

    Raises:
        NotDirectError: the checkpoint has none.
    """
    import json

    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        quiet = ("missing_entries", "gated_repo", "connection_errors")  # `from_pretrained` says what is wrong
        found: str | None = cached_file(
            path, name, revision=revision, **{f"_raise_exceptions_for_{case}": False for case in quiet}
        )
        return found

    index = find("model.safetensors.index.json") if (single := find("model.safetensors")) is None else None
    if single is not None:
        with safe_open(single, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)
    if index is None:
        raise NotDirectError("no safetensors files")
    parts: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    paths = {name: find(name) for name in set(parts.values())}
    if None in paths.values():
        raise NotDirectError("a safetensors file of its index is missing")
    return {name: str(paths[part]) for name, part in parts.items()}


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Move parameters to the `meta` device as modules register them; buffers are computed as usual."""

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        empty.__dict__.update(parameter.__dict__)
        return empty

    handle = register_module_parameter_registration_hook(moved)  # type: ignore[arg-type]  # torch's own type forbids its use
    try:
        yield
    finally:
        handle.remove()


def _match(network: PreTrainedModel, files: Collection[str]) -> dict[str, list[_Use]]:
    """Return the uses of each parameter and persistent buffer by its name in the files.

    Raises:
        NotDirectError: a tensor is missing, or stored under two names.
    """
    groups: dict[int, list[_Use]] = defaultdict(list)
    for prefix, module in network.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and name not in module._non_persistent_buffers_set:
                groups[id(tensor)].append(_Use(f"{dot}{name}", module, name))
    base = f"{network.base_model_prefix}."
    places: dict[str, list[_Use]] = {}
    for uses in groups.values():
        names = {use.name for use in uses}
        # A trunk reads the checkpoint of a language model, and the other way around.
        found = sorted({one for name in names for one in (name, base + name, name.removeprefix(base)) if one in files})
        if len(found) != 1:
            raise NotDirectError(f"{len(found)} tensors in the files for {uses[0].name}")
        places[found[0]] = uses
    return places


def _place(
    path: str,
    tensors: list[list[tuple[str, Any]]],
    uses: list[_Use],
    *,
    frozen: bool,
    narrow: dict[int, nn.Parameter],
    shards: WeightShards | None,
) -> None:
    """Copy a parameter or buffer from its tensors in the files to all its uses.

    Args:
        tensors: name and opened file of each tensor, by part and expert.

    Raises:
        UserError: it holds NaN or infinite numbers.
        NotDirectError: the tensors have other shapes, or a dtype with more numbers than float32.
    """
    parts = [[file.get_slice(name) for name, file in part] for part in tensors]
    (name, file), stored = tensors[0][0], parts[0][0]
    stacked = len(parts) > 1 or len(parts[0]) > 1
    shape = stacked_shape([[one.get_shape() for one in part] for part in parts]) if stacked else list(stored.get_shape())
    _, module, attribute = uses[0]
    empty = module._parameters.get(attribute)
    wanted = module._buffers[attribute] if empty is None else empty
    if wanted is None or shape != list(wanted.shape):
        raise NotDirectError(f"{name} has shape {stored.get_shape()}")
    if empty is None:
        wanted.copy_(file.get_tensor(name))
        return
    dtypes = {_FLOATS.get(one.get_dtype()) for part in parts for one in part}
    dtype = dtypes.pop()
    if dtype is None or dtypes:
        raise NotDirectError(f"{name} is {stored.get_dtype()}")
    held = dtype if id(empty) in narrow and dtype in HALVES else torch.float32
    value = torch.empty(wanted.shape, dtype=held, device="cpu" if shards is None else shards.device)
    if value.ndim == 0:
        value.copy_(file.get_tensor(name))
    else:
        rows = slice(0, len(value)) if shards is None else shards.own_rows(value.shape)
        if stacked:
            copy_stacked(value, rows, parts)
        else:
            value[rows].copy_(stored[rows])
        if not value[rows].sum(dtype=torch.float32).isfinite():
            raise UserError(f"model.path {path!r}: {uses[0].name} holds NaN or infinite numbers")
    parameter = nn.Parameter(value, requires_grad=not frozen and empty.requires_grad)
    parameter.__dict__.update(empty.__dict__)
    if shards is not None:
        shards.settle(parameter)
    for use in uses:
        use.module._parameters[use.attribute] = parameter
