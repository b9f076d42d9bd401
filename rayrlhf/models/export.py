"""Hugging Face folders of trained networks: language models, critics and reward models."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer
from rayrlhf.models.load import save_model_folder
from rayrlhf.models.network import Network
from rayrlhf.models.value_head import HEAD_FILE


def save_network(network: Network, state: Mapping[str, Tensor], tokenizer: Tokenizer, folder: Path) -> None:
    """Write merged weights, tokenizer and value head atomically; an older folder is replaced.

    A trunk with a bias-free scalar head becomes a sequence classifier with one label (`save_reward_model`).

    Args:
        network: network the weights are of.
        state: weights by checkpoint name, adapters merged.
        tokenizer: saved with them.
        folder: path to write.

    Raises:
        UserError: a reward model of an architecture without a sequence classifier in transformers.
    """
    head = network.v_head
    if _is_reward_model(network):
        save_reward_model(network, state, tokenizer, folder)
        return
    tensors = {} if head is None else {f"v_head.{name}": tensor.detach().cpu() for name, tensor in head.state_dict().items()}
    save_model_folder(folder, network.model, state, tokenizer, {HEAD_FILE: tensors} if tensors else {})


def save_reward_model(network: Network, state: Mapping[str, Tensor], tokenizer: Tokenizer, folder: Path) -> None:
    """Write a reward model as a sequence classifier with one label.

    `AutoModelForSequenceClassification` loads it and reads the score at the last real token.

    Args:
        network: trunk with a bias-free scalar head.
        state: weights of the trunk by checkpoint name, adapters merged.
        tokenizer: saved with them; its pad token marks the end of a padded text for the classifier.
        folder: path to write; an older folder is replaced.

    Raises:
        UserError: transformers has no sequence classifier of this architecture.
    """
    from transformers import AutoModelForSequenceClassification

    if network.v_head is None:
        raise ValueError("the network has no scalar head, expected a reward model")
    config = type(network.model.config).from_dict(network.model.config.to_dict())
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(f"a {config.model_type} model cannot be exported as a reward model: {error}") from error
    prefix = classifier.base_model_prefix
    tensors = {f"{prefix}.{name}": tensor for name, tensor in state.items()}
    tensors["score.weight"] = network.v_head.summary.weight.detach().cpu().clone()
    missing = set(classifier.state_dict()) - set(tensors)
    if missing:
        raise UserError(
            f"a {config.model_type} model cannot be exported as a reward model: no weights for {sorted(missing)[0]}"
        )
    save_model_folder(folder, classifier, tensors, tokenizer)


def _is_reward_model(network: Network) -> bool:
    return network.v_head is not None and not network.has_lm_head and network.v_head.summary.bias is None
