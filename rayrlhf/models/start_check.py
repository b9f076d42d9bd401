"""Checks of a model before a run starts.

They read its configuration, and its weights if these are small.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rayrlhf.config.model import ModelSection
from rayrlhf.config.section import GIB
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer
from rayrlhf.models.load import load_architecture, require_text_model, resolve_path
from rayrlhf.models.network import Head, build_network
from rayrlhf.models.skeleton import check_adapters

SMALL = 2 * GIB
"""Largest weight files that a dry run loads; larger models are checked by the processes that train them."""


def check_tokens(model: ModelSection, tokenizer: Tokenizer, sequences: Iterable[NDArray[np.int32]]) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        UserError: it has not; names the first such token.
    """
    rows = int(load_architecture(model).get_text_config().vocab_size)
    if len(tokenizer) <= rows:
        return
    for sequence in sequences:
        if len(sequence) and sequence.max() >= rows:
            token = int(sequence[sequence >= rows][0])
            raise UserError(
                f"model.path {model.path!r}: its tokenizer writes {tokenizer.convert_ids_to_tokens(token)!r} as token {token}, "
                f"expected at most {rows - 1}, the last row of the model's embedding"
            )


def check_configuration(model: ModelSection) -> None:
    """Check what the configuration alone shows.

    Raises:
        UserError: a multimodal model, or adapters on modules that cannot have them.
    """
    require_text_model(load_architecture(model), model)
    check_adapters(model)


def check_divides_heads(model: ModelSection, devices: int, key: str) -> None:
    """Check that a tensor-parallel size divides the attention heads; messages name the setting `key`.

    Raises:
        UserError: it does not.
    """
    if devices == 1:
        return
    heads = getattr(load_architecture(model).get_text_config(), "num_attention_heads", None)
    if isinstance(heads, int) and heads % devices:
        fitting = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        raise UserError(f"{key} {devices}: {model.path} has {heads} attention heads; expected one of {fitting}")


def describe_check(model: ModelSection, heads: frozenset[Head], *, packing: bool = False) -> str:
    """Load a small model, check it, and return the outcome in words.

    Args:
        model: model with its adapters.
        heads: as in `build_network`.
        packing: check packed rows too.

    Raises:
        UserError: the model cannot be loaded, or is refused.
    """
    check_configuration(model)
    folder = Path(resolve_path(model))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    if not 0 < size <= SMALL:
        amount = f"{size / GIB:.1f} GiB of weights" if size else "no weights in a local folder"
        return f"{amount}, checked when the run loads it"
    network = build_network(model, heads, "zero", 0)
    if packing:
        network.accept_packed_rows()
    return network.check.line()
