"""Rules by which a run folder and its checkpoints belong to a configuration."""

import json
from typing import Any

import yaml

from rayrlhf.config.loading.load import differences, stored_config
from rayrlhf.config.model import ModelSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.models.load import load_architecture

_LENGTH = (
    "run.root:",
    "run.steps:",
    "run.resume:",
    "evaluation.every:",
    "evaluation.enabled:",
    "checkpoint.",
    "deadlines.",
    "observe.",
    "rollout.weight_transfer:",
)
"""Settings of a run's length and outputs, and of the path of its weights, which no step depends on."""
MAY_CHANGE = (
    *_LENGTH,
    "placement.",
    "rollout.replicas:",
    "rollout.tensor_parallel_size:",
    "rollout.pipeline_parallel_size:",
    "reward.judge.replicas:",
    "reward.judge.tensor_parallel_size:",
    "recovery.",
    "train.share_prefixes:",
)
"""Settings that a resumed run may change: its length and outputs, where it is carried out, and what changes rounding only."""

_BEFORE = {"environment": ("votes", "segment"), "train": ("share_prefixes", "off")}
"""Section -> key that older run folders do not have, and the behavior of the code that wrote them."""


def stored_differences(stored: str, current: str) -> list[str]:
    """Return the lines that make a run folder's configuration another run than the current one.

    A run may become longer or shorter, and continue elsewhere on more or fewer processes. One that is `exact` keeps its
    processes, because its bits depend on them.
    """
    before, after = stored_config(PPOConfig, _with_older_behavior(stored)), stored_config(PPOConfig, current)
    exact = "exact" in (before.run.determinism, after.run.determinism)
    return [line for line in differences(before, after) if not line.startswith(_LENGTH if exact else MAY_CHANGE)]


def _with_older_behavior(stored: str) -> str:
    """Return a stored configuration with the keys that its version did not have."""
    tree = yaml.safe_load(stored)
    for section, (key, value) in _BEFORE.items():
        if isinstance(tree.get(section), dict):
            tree[section].setdefault(key, value)
    return yaml.safe_dump(tree)


def fingerprint(config: PPOConfig) -> dict[str, str]:
    """Return the settings on which two runs must agree to load each other's training state.

    Networks, heads, adapters, optimizer and ZeRO stage.
    """
    parts: dict[str, Any] = {"model": _shape(config.model), "critic.kind": config.critic.kind}
    if config.critic.kind == "separate":
        parts["critic.model"] = _shape(config.critic.model or config.model)
    parts |= {
        "model.lora": config.model.lora.model_dump(mode="json") if config.model.lora else None,
        "train.optimizer.name": config.train.optimizer.name,
    } | config.train.sharding_fingerprint()
    return {key: json.dumps(value, sort_keys=True) for key, value in parts.items()}


def _shape(model: ModelSection) -> dict[str, Any]:
    architecture = load_architecture(model)
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(architecture, name, None) for name in (*names, "num_key_value_heads", "tie_word_embeddings")}
