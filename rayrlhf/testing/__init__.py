"""Contract tests for authors of plugins, for example `check_reward_function("my_rewards.py:polite")`.

Each raises AssertionError with one line if the plugin breaks its contract.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "check_advantage_estimator": "rayrlhf.testing.algorithms",
    "check_callback": "rayrlhf.testing.callbacks",
    "check_environment": "rayrlhf.testing.environments",
    "check_kl_estimator": "rayrlhf.testing.algorithms",
    "check_policy_loss": "rayrlhf.testing.algorithms",
    "check_reward_function": "rayrlhf.testing.reward_functions",
    "check_rollout_engine": "rayrlhf.testing.rollout_engines",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Import a contract test on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rayrlhf.testing' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
