"""The presets hold TRL's own defaults, option by option, as its two PPO configurations name them."""

from typing import Any

import pytest

from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig

# TRL option -> (default, our key). Classic: PPOConfig of 0.7 to 0.11; modern: PPOConfig of 0.12 to 1.12 and the
# transformers arguments under it.
CLASSIC = {
    "learning_rate": (1.41e-5, "train.learning_rate"),
    "init_kl_coef": (0.2, "algorithm.kl.coefficient"),
    "kl_penalty": ("k1", "algorithm.kl.estimator"),
    "target": (6.0, "algorithm.kl.target"),
    "horizon": (10_000, "algorithm.kl.horizon"),
    "gamma": (1.0, "algorithm.advantage.gamma"),
    "lam": (0.95, "algorithm.advantage.lam"),
    "cliprange": (0.2, "algorithm.policy_loss.clip_high"),
    "cliprange_value": (0.2, "algorithm.value_loss.clip"),
    "vf_coef": (0.1, "algorithm.value_loss.coefficient"),
    "batch_size": (128, "rollout.prompts_per_step"),
    "mini_batch_size": (128, "train.mini_batch_size"),
    "ppo_epochs": (4, "train.epochs"),
    "max_grad_norm": (None, "train.max_grad_norm"),
    "ratio_threshold": (10.0, "train.ratio_guard"),
    "early_stopping": (None, "train.early_stop_kl"),
    "use_score_scaling": (False, "algorithm.shaping.scale"),
    "use_score_norm": (False, "algorithm.shaping.center"),
    "score_clip": (None, "algorithm.shaping.clip"),
    "whiten_rewards": (False, "algorithm.shaping.whiten_rewards"),
    "optimizer": ("adam", "train.optimizer.name"),
    "value head": ("shared", "critic.kind"),
    "value head initialisation": ("default", "critic.head_init"),
    "score slot": ("last", "algorithm.shaping.score_position"),
    "masked spans": (False, "algorithm.advantage.skip_masked"),
    "temperature": (1.0, "rollout.temperature"),
}
MODERN = {
    "learning_rate": (3e-6, "train.learning_rate"),
    "kl_coef": (0.05, "algorithm.kl.coefficient"),
    "kl_estimator": ("k1", "algorithm.kl.estimator"),
    "adaptive": (None, "algorithm.kl.target"),
    "gamma": (1.0, "algorithm.advantage.gamma"),
    "lam": (0.95, "algorithm.advantage.lam"),
    "cliprange": (0.2, "algorithm.policy_loss.clip_low"),
    "cliprange_value": (0.2, "algorithm.value_loss.clip"),
    "vf_coef": (0.1, "algorithm.value_loss.coefficient"),
    "num_ppo_epochs": (4, "train.epochs"),
    "response_length": (53, "rollout.max_new_tokens"),
    "temperature": (0.7, "rollout.temperature"),
    "missing_eos_penalty": (None, "algorithm.shaping.missing_eos_penalty"),
    "whiten_rewards": (False, "algorithm.shaping.whiten_rewards"),
    "max_grad_norm, never applied": (None, "train.max_grad_norm"),
    "optim": ("adamw", "train.optimizer.name"),
    "adam betas": ((0.9, 0.999), "train.optimizer.betas"),
    "lr_scheduler_type": ("linear", "train.schedule.shape"),
    "value_model": ("separate", "critic.kind"),
    "score slot": ("after_last", "algorithm.shaping.score_position"),
}


def value_at(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("preset", "option"), [("trl-classic", option) for option in CLASSIC] + [("trl-modern", option) for option in MODERN]
)
def test_a_preset_holds_trls_own_default(preset, option, minimal):
    expected, key = (CLASSIC if preset == "trl-classic" else MODERN)[option]
    assert value_at(load_config(PPOConfig, minimal, [f"preset={preset}"]), key) == expected
