"""Checks of a model before a run starts.

They read its configuration, and its weights if these are small.
"""

from collections.abc import Iterable
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from rayrlhf.config.model import ModelSection
from rayrlhf.config.section import GIB
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer
from rayrlhf.models.load import check_architecture, load_architecture
from rayrlhf.models.model_files import check_weights
from rayrlhf.models.model_path import present_folder
from rayrlhf.models.network import build_network
from rayrlhf.models.network_io import Head
from rayrlhf.models.skeleton import check_adapters

SMALL = 2 * GIB
"""Largest weight files that a dry run loads; larger models are checked by the processes that train them."""


def check_tokens(model: ModelSection, tokenizer: Tokenizer, sequences: Iterable[NDArray[np.int32]]) -> None:
    """Check that the model has an embedding for every token.

    The one that ends a text counts, too.

    Raises:
        UserError: it has not; names the first such token.
    """
    rows = int(load_architecture(model).get_text_config().vocab_size)
    if len(tokenizer) <= rows:
        return
    end = [] if tokenizer.eos_token_id is None else [np.array([tokenizer.eos_token_id], dtype=np.int32)]
    for sequence in chain(end, sequences):
        if len(sequence) and sequence.max() >= rows:
            token = int(sequence[sequence >= rows][0])
            raise UserError(
                f"model.path {model.path!r}: its tokenizer writes {tokenizer.convert_ids_to_tokens(token)!r} as token {token}, "
                f"expected at most {rows - 1}, the last row of the model's embedding"
            )


def check_configuration(model: ModelSection) -> None:
    """Check a model by its configuration and by the names and sizes of its files.

    Raises:
        UserError: a model that is not supported, incomplete weight files, or adapters on modules that cannot have them.
    """
    check_architecture(load_architecture(model), model)
    folder = present_folder(model)
    if folder is not None:
        check_weights(folder, model.path)
    check_adapters(model)


def check_generating_model(model: ModelSection, backend: str, devices: int, section: str, stages: int = 1) -> None:
    """Check files, attention heads and layers of a model that only generates.

    Backends other than `transformers` may read quantized and multimodal models.

    Args:
        model: the model.
        backend: of generation.
        devices: tensor-parallel size.
        section: that holds it in the configuration, for the message.
        stages: pipeline-parallel size.

    Raises:
        UserError: files that are not whole, a model that `transformers` does not compute here, heads that do not divide, or
            more stages than layers.
    """
    if backend == "transformers":
        check_configuration(model)
    elif (folder := present_folder(model)) is not None:
        check_weights(folder, model.path, quantized=True)
    check_divides_heads(model, devices, f"{section}.tensor_parallel_size")
    check_stages(model, stages, f"{section}.pipeline_parallel_size")


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


def check_stages(model: ModelSection, stages: int, key: str) -> None:
    """Check that each pipeline stage has a layer; messages name the setting `key`.

    Raises:
        UserError: there are more stages than layers.
    """
    layers = getattr(load_architecture(model).get_text_config(), "num_hidden_layers", None) if stages > 1 else None
    if isinstance(layers, int) and stages > layers:
        raise UserError(f"{key} {stages}: {model.path} has {layers} layers; expected at most {layers}")


def describe_check(model: ModelSection, heads: frozenset[Head], *, packing: bool = False, unshared: str = "") -> str:
    """Load a small model, check it, and return the outcome in words.

    Args:
        model: model with its adapters.
        heads: as in `build_network`.
        packing: the run packs samples.
        unshared: the setting because of which it shares no prefixes; empty where it may.

    Raises:
        UserError: the model cannot be loaded, or is refused.
    """
    check_configuration(model)
    folder = present_folder(model)
    size = check_weights(folder, model.path) if folder is not None else 0
    if not 0 < size <= SMALL:
        amount = f"{size / GIB:.1f} GiB of weights" if size else "a model of the hub that is not in its cache"
        later = f"{amount}, checked when the run loads it"
        return f"{later}, prefixes are not shared: {unshared}" if unshared else later
    network = build_network(model, heads, "zero", 0)
    network.accept_packed_rows(packing=packing, unshared=unshared)
    return network.check.line()
