"""Hugging Face folders of trained networks: language models, critics and reward models."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError
from rayrlhf.library_types import PretrainedConfig, PreTrainedModel, Tokenizer
from rayrlhf.models.load import load_architecture, save_model_folder
from rayrlhf.models.network import Network
from rayrlhf.models.tensor_files import TensorStream
from rayrlhf.models.value_head import HEAD_FILE

SCORE = "score.weight"
"""Name of the scalar head in a sequence classifier."""


def save_network(
    network: Network,
    state: Mapping[str, Tensor] | TensorStream,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write merged weights, tokenizer and value head atomically; an older folder is replaced.

    A trunk with a bias-free scalar head becomes a sequence classifier with one label (`save_reward_model`).

    Args:
        network: network the weights are of.
        state: weights by checkpoint name, adapters merged; a stream is written as it comes.
        tokenizer: saved with them.
        folder: path to write.
        dtype: of the weights, recorded in the configuration.

    Raises:
        UserError: a reward model of an architecture without a sequence classifier in transformers.
    """
    head = network.v_head
    if _is_reward_model(network):
        save_reward_model(network, state, tokenizer, folder, dtype)
        return
    tensors = {} if head is None else {f"v_head.{name}": tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    save_model_folder(folder, network.model, state, tokenizer, {HEAD_FILE: tensors} if tensors else {}, dtype)


def save_reward_model(
    network: Network,
    state: Mapping[str, Tensor] | TensorStream,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a reward model as a sequence classifier with one label.

    `AutoModelForSequenceClassification` loads it and reads the score at the last real token.

    Args:
        network: trunk with a bias-free scalar head.
        state: weights of the trunk by checkpoint name, adapters merged.
        tokenizer: saved with them; its pad token marks the end of a padded text for the classifier.
        folder: path to write; an older folder is replaced.
        dtype: of the weights, recorded in the configuration.

    Raises:
        UserError: transformers has no sequence classifier of this architecture.
    """
    if network.v_head is None:
        raise ValueError("the network has no scalar head, expected a reward model")
    config = type(network.model.config).from_dict(network.model.config.to_dict())
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= config.vocab_size:
        tokenizer.pad_token = tokenizer.eos_token  # its own has no embedding
    config.pad_token_id = tokenizer.pad_token_id
    kinds = state.kinds if isinstance(state, TensorStream) else state
    classifier = _classifier(config, kinds)
    prefix, score = f"{classifier.base_model_prefix}.", network.v_head.summary.weight.detach().cpu().clone()
    if isinstance(state, TensorStream):
        save_model_folder(folder, classifier, state.renamed(prefix, **{SCORE: score}), tokenizer, dtype=dtype)
        return
    tensors = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    save_model_folder(folder, classifier, {**tensors, SCORE: score}, tokenizer, dtype=dtype)


def check_reward_model(model: ModelSection) -> None:
    """Check, without weights, that a reward model of this architecture can be exported.

    Raises:
        UserError: transformers has no sequence classifier of it, or one with other weights.
    """
    from transformers import AutoModel

    architecture = load_architecture(model)
    with torch.device("meta"):
        trunk = AutoModel.from_config(architecture, trust_remote_code=model.trust_remote_code)
    _classifier(architecture, trunk.state_dict())


def _classifier(config: PretrainedConfig, names: Iterable[str]) -> PreTrainedModel:
    """Return an architecture's sequence classifier, without weights, for a trunk with the given tensors."""
    from transformers import AutoModelForSequenceClassification

    config.num_labels = 1
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        raise UserError(
            f"a {config.model_type} model cannot become a reward model: transformers has no sequence classifier of it"
        ) from None
    known = {SCORE, *(f"{classifier.base_model_prefix}.{name}" for name in names)}
    missing = sorted(set(classifier.state_dict()) - known)
    if missing:
        raise UserError(f"a {config.model_type} model cannot become a reward model: no weights for {missing[0]}")
    return classifier


def _is_reward_model(network: Network) -> bool:
    return network.v_head is not None and not network.has_lm_head and network.v_head.summary.bias is None
