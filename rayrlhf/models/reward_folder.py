"""A reward model as transformers and others know it: a sequence classifier of one label, which reads the last real token."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayrlhf.errors import UserError
from rayrlhf.models.load import save_model_folder
from rayrlhf.models.network import Network


def is_reward_model(network: Network) -> bool:
    """Whether it is a trunk with a scalar head without bias, as classifiers have it."""
    return network.v_head is not None and not network.has_lm_head and network.v_head.summary.bias is None


def save_reward_model(network: Network, state: Mapping[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Write a folder that `AutoModelForSequenceClassification` loads, and this project as a reward model or critic.

    Args:
        network: a trunk with a head, see `is_reward_model`.
        state: the trunk's weights by checkpoint name, adapters folded in.
        tokenizer: saved beside them; its pad token tells the classifier where a padded text ends.
        folder: where it goes; an older one is replaced.

    Raises:
        UserError: transformers has no sequence classifier of this architecture.
    """
    from transformers import AutoModelForSequenceClassification

    if network.v_head is None:
        raise ValueError("a network without a head is no reward model")
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
