"""RLHF as a distributed actor system on Ray.

The names below are what a user's own script needs. They are imported when first asked for, so that `import rayrlhf` is instant.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "Callback": "rayrlhf.ppo.callbacks",
    "DPOConfig": "rayrlhf.config.tuning.configs",
    "PPOConfig": "rayrlhf.config.ppo",
    "PPOTrainer": "rayrlhf.ppo.trainer",
    "RewardTrainingConfig": "rayrlhf.config.tuning.configs",
    "SFTConfig": "rayrlhf.config.tuning.configs",
    "load_config": "rayrlhf.config.loading.load",
    "register_reward": "rayrlhf.rewards.registry",
    "train_dpo": "rayrlhf.tuning.train_model",
    "train_ppo": "rayrlhf.ppo.train_ppo",
    "train_reward": "rayrlhf.tuning.train_model",
    "train_sft": "rayrlhf.tuning.train_model",
}
_NAMES = {"register_reward": "register"}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rayrlhf' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), _NAMES.get(name, name))
