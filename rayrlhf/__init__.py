"""RLHF as a distributed actor system on Ray.

The names below are those that a user's script needs. They are imported on first use, so that `import rayrlhf` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayrlhf.config.loading.load import load_config
    from rayrlhf.config.ppo import PPOConfig
    from rayrlhf.config.tuning import DPOConfig, RewardTrainingConfig, SFTConfig
    from rayrlhf.ppo.callbacks import Callback
    from rayrlhf.ppo.open_trainer import open_trainer
    from rayrlhf.ppo.train_ppo import train_ppo
    from rayrlhf.ppo.trainer import PPOTrainer
    from rayrlhf.rewards.registry import register as register_reward
    from rayrlhf.tuning.train_model import train_dpo, train_reward, train_sft

__version__ = "0.2.0"

_PUBLIC = {
    "Callback": "rayrlhf.ppo.callbacks",
    "DPOConfig": "rayrlhf.config.tuning",
    "PPOConfig": "rayrlhf.config.ppo",
    "PPOTrainer": "rayrlhf.ppo.trainer",
    "RewardTrainingConfig": "rayrlhf.config.tuning",
    "SFTConfig": "rayrlhf.config.tuning",
    "load_config": "rayrlhf.config.loading.load",
    "open_trainer": "rayrlhf.ppo.open_trainer",
    "register_reward": "rayrlhf.rewards.registry",
    "train_dpo": "rayrlhf.tuning.train_model",
    "train_ppo": "rayrlhf.ppo.train_ppo",
    "train_reward": "rayrlhf.tuning.train_model",
    "train_sft": "rayrlhf.tuning.train_model",
}
_NAMES = {"register_reward": "register"}

__all__ = [
    "Callback",
    "DPOConfig",
    "PPOConfig",
    "PPOTrainer",
    "RewardTrainingConfig",
    "SFTConfig",
    "load_config",
    "open_trainer",
    "register_reward",
    "train_dpo",
    "train_ppo",
    "train_reward",
    "train_sft",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rayrlhf' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), _NAMES.get(name, name))
