"""Presets of TRL's two PPO trainers.

`trl-classic` is `PPOTrainer` up to TRL 0.11: value head on the policy's trunk, adaptive KL, scores on the last token, Adam.
`trl-modern` is `PPOv2Trainer`, then `PPOTrainer` of TRL 0.12 to 1.12: separate critic, fixed KL, scores one slot after the stop
token, temperature 0.7. Both take the mean of each micro-batch by itself. This quirk alone is switched on, because it changes
the objective and not only its rounding.
"""

from typing import Any

CLASSIC: dict[str, Any] = {
    "critic": {"kind": "shared", "head_init": "default"},
    "rollout": {"prompts_per_step": 128, "samples_per_prompt": 1, "temperature": 1.0},
    "algorithm": {
        # init_kl_coef, target, horizon, adap_kl_ctrl of its PPOConfig.
        "kl": {"estimator": "k1", "placement": "reward", "coefficient": 0.2, "target": 6.0, "horizon": 10_000},
        "shaping": {"score_position": "last", "whiten_rewards": False},
        "advantage": {"estimator": "gae", "gamma": 1.0, "lam": 0.95, "whiten": True, "skip_masked": False},
        "policy_loss": {"name": "ppo", "clip_low": 0.2, "clip_high": 0.2, "entropy_coefficient": 0.0},
        "value_loss": {"coefficient": 0.1, "clip": 0.2},
        "parity": {"mini_batch_means": True},
    },
    "train": {
        "learning_rate": 1.41e-5,
        "epochs": 4,
        "mini_batch_size": 128,
        "micro_batch_size": 128,
        "max_grad_norm": None,
        "ratio_guard": 10.0,
        "early_stop_kl": None,
        "optimizer": {"name": "adam", "betas": [0.9, 0.999], "epsilon": 1e-8, "weight_decay": 0.0},
        "schedule": {"shape": "constant"},
    },
}

MODERN: dict[str, Any] = {
    "critic": {"kind": "separate"},
    # The batch of TRL's own TL;DR run: 16 prompts a device, accumulated 4 times.
    "rollout": {"prompts_per_step": 64, "samples_per_prompt": 1, "max_new_tokens": 53, "temperature": 0.7},
    "algorithm": {
        "kl": {"estimator": "k1", "placement": "reward", "coefficient": 0.05, "target": None},
        "shaping": {"score_position": "after_last", "whiten_rewards": False},
        "advantage": {"estimator": "gae", "gamma": 1.0, "lam": 0.95, "whiten": True},
        "policy_loss": {"name": "ppo", "clip_low": 0.2, "clip_high": 0.2, "entropy_coefficient": 0.0},
        "value_loss": {"coefficient": 0.1, "clip": 0.2},
        "parity": {"mini_batch_means": True},
    },
    "train": {
        "learning_rate": 3e-6,
        "epochs": 4,
        "mini_batch_size": 64,
        "micro_batch_size": 16,
        "max_grad_norm": None,
        "optimizer": {"name": "adamw", "betas": [0.9, 0.999], "epsilon": 1e-8, "weight_decay": 0.0},
        "schedule": {"shape": "linear"},
    },
}
