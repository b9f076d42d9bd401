"""Presets: trees of values under a configuration file with a top-level `preset:` key.

A recipe of a published algorithm holds the keys that make it: estimator, KL, loss, aggregation, samples per prompt, passes.
Models, data, lengths and batch sizes belong to the run; where a paper's clip range needs several updates per step, the comment
gives its number. Values without a paper come from the named code. `learning_rate` is for full fine-tuning of models of 1B
parameters or more.

`trl-classic` is `PPOTrainer` up to TRL 0.11: value head on the policy's trunk, adaptive KL, scores on the last token, Adam.
`trl-modern` is `PPOv2Trainer`, then `PPOTrainer` of TRL 0.12 to 1.12: separate critic, fixed KL, scores one slot after the stop
token, temperature 0.7. Both take the mean of each micro-batch by itself. This quirk alone is switched on, because it changes
the objective and not only its rounding.
"""

import difflib
from typing import Any

from rayrlhf.errors import UserError

Tree = dict[str, Any]
_NO_KL: Tree = {"coefficient": 0.0}

# Schulman et al. 2017 (clip, GAE), Ouyang et al. 2022 (InstructGPT, appendix C.4: KL, discount, passes, temperature), Huang et
# al. 2022 ("The 37 implementation details of PPO": whitening, value clip). InstructGPT takes 8 updates per step.
_PPO: Tree = {
    "critic": {"kind": "separate"},  # InstructGPT: a value function of its own, started from the reward model
    "rollout": {"samples_per_prompt": 1, "temperature": 1.0},  # InstructGPT
    "algorithm": {
        "kl": {"estimator": "k1", "placement": "reward", "coefficient": 0.02, "target": None},  # InstructGPT: beta 0.02
        "advantage": {
            "estimator": "gae",
            "gamma": 1.0,  # InstructGPT: no discount
            "lam": 0.95,  # Schulman et al. 2017, table 3
            "whiten": True,  # 37 details, number 7
        },
        "policy_loss": {"name": "ppo", "clip_low": 0.2, "clip_high": 0.2, "loss_aggregation": "token"},  # equation 7
        "value_loss": {"clip": 0.2},  # 37 details, number 9
    },
    "train": {"epochs": 1},  # InstructGPT: a single inner epoch
}

# Shao et al. 2024 (DeepSeekMath). Its batch is 1024 responses in one update.
_GRPO: Tree = {
    "critic": {"kind": "none"},  # section 4.1.1
    "rollout": {"samples_per_prompt": 64, "temperature": 1.0},  # section 4.2: 64 outputs per question
    "algorithm": {
        # Equation 4 (k3), equation 3 (in the loss), section 4.2 (0.04). The gradient is that of k2, see `kl_loss`.
        "kl": {"estimator": "k3", "placement": "loss", "coefficient": 0.04, "target": None},
        "advantage": {"estimator": "grpo", "whiten": False},  # section 4.1.2
        # Equation 3: a mean over each response, then over responses. The paper names no clip range: TRL 1.16 `epsilon`.
        "policy_loss": {"name": "ppo", "clip_low": 0.2, "clip_high": 0.2, "loss_aggregation": "sequence"},
    },
    "train": {"learning_rate": 1e-6, "epochs": 1},  # section 4.2: 1e-6, a single update per exploration stage
}

# Liu et al. 2025 ("Understanding R1-Zero-Like Training"), numbers of its experiments.
_DR_GRPO: Tree = {
    "critic": {"kind": "none"},
    "rollout": {"samples_per_prompt": 8, "temperature": 1.0},
    "algorithm": {
        "kl": _NO_KL,  # section 2: no reference model for rule-based rewards
        "advantage": {"estimator": "dr_grpo", "whiten": False},  # section 3.2: no division by the standard deviation
        # Section 3.2: a constant divisor, here rollout.max_new_tokens.
        "policy_loss": {"name": "ppo", "clip_low": 0.2, "clip_high": 0.2, "loss_aggregation": "constant"},
    },
    "train": {"learning_rate": 1e-6, "epochs": 1},
}

# Yu et al. 2025 (DAPO), section 4.1 for numbers. 512 prompts, 16 updates per step.
_DAPO: Tree = {
    "critic": {"kind": "none"},
    "rollout": {
        "samples_per_prompt": 16,
        "temperature": 1.0,
        "refill_rounds": 10,  # section 3.2 samples until the step is full; verl's recipe: at most 10 batches
    },
    "algorithm": {
        "kl": _NO_KL,  # section 2.3
        "shaping": {
            "overlong_buffer": 0.2,  # equation 13: 4096 of 20480 tokens
            "overlong_penalty": 1.0,  # equation 13
        },
        "advantage": {"estimator": "grpo", "whiten": False},  # equation 9
        "policy_loss": {
            "name": "ppo",
            "clip_low": 0.2,  # section 3.1, clip-higher
            "clip_high": 0.28,  # section 3.1, clip-higher
            "loss_aggregation": "token",  # section 3.3, equation 12
        },
    },
    "train": {"learning_rate": 1e-6, "epochs": 1},
}

# Ahmadian et al. 2024 ("Back to Basics"), numbers of TRL 1.16 `RLOOConfig`.
_RLOO: Tree = {
    "critic": {"kind": "none"},
    "rollout": {"samples_per_prompt": 2, "temperature": 1.0},  # `num_generations`; the paper takes 2 and 4
    "algorithm": {
        "kl": {"estimator": "k1", "placement": "reward", "coefficient": 0.05, "target": None},  # `beta`
        "advantage": {"estimator": "rloo", "whiten": False},  # `normalize_advantages`
        # The response is one action, so its token losses are summed and only responses are averaged.
        "policy_loss": {
            "name": "ppo",
            "clip_low": 0.2,  # `epsilon`; without effect in the only update of a step
            "clip_high": 0.2,
            "loss_aggregation": "constant",
            "loss_aggregation_length": 1,
        },
    },
    "train": {"learning_rate": 1e-6, "epochs": 1},  # `learning_rate`, `num_iterations`
}

# Hu et al. 2025 (REINFORCE++); numbers of OpenRLHF's train_reinforce_llama_ray_hybrid_engine.sh, which takes 8 updates per
# step.
_REINFORCE_PP: Tree = {
    "critic": {"kind": "none"},
    "rollout": {"samples_per_prompt": 1, "temperature": 1.0},
    "algorithm": {
        "kl": {"estimator": "k1", "placement": "reward", "coefficient": 1e-4, "target": None},  # KL in the token rewards
        "advantage": {"estimator": "reinforce++", "gamma": 1.0, "whiten": True},  # global normalization
        "policy_loss": {"name": "ppo", "clip_low": 0.2, "clip_high": 0.2, "loss_aggregation": "token"},  # PPO's clip
    },
    "train": {"learning_rate": 5e-7, "epochs": 1},
}

# Hu et al. 2025, the form for groups; numbers of OpenRLHF's train_reinforce_baseline_hybrid_engine.sh, one update per step.
_REINFORCE_PP_BASELINE: Tree = {
    "critic": {"kind": "none"},
    "rollout": {"samples_per_prompt": 8, "temperature": 1.0},
    "algorithm": {
        "kl": {"estimator": "k2", "placement": "loss", "coefficient": 1e-5, "target": None},  # a KL loss of k2
        # The group's mean as baseline, then global normalization.
        "advantage": {"estimator": "reinforce++-baseline", "gamma": 1.0, "whiten": True},
        "policy_loss": {"name": "ppo", "clip_low": 0.2, "clip_high": 0.2, "loss_aggregation": "token"},
    },
    "train": {"learning_rate": 5e-7, "epochs": 1},
}

# Li et al. 2024 (ReMax), algorithm 1; numbers of the authors' run_llama2_7b.sh.
_REMAX: Tree = {
    "critic": {"kind": "none"},
    "rollout": {"samples_per_prompt": 1, "temperature": 1.0},  # one sample and one greedy response
    "algorithm": {
        "kl": {"estimator": "k1", "placement": "reward", "coefficient": 0.05, "target": None},  # `kl_ctl`
        "advantage": {"estimator": "remax", "gamma": 0.99, "whiten": False},  # `gamma`
        # The sum over a response, as in RLOO. The paper has no clip, and in the only update of a step it has no effect.
        "policy_loss": {
            "name": "ppo",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "loss_aggregation": "constant",
            "loss_aggregation_length": 1,
        },
    },
    "train": {
        "learning_rate": 1e-6,  # `actor_learning_rate`
        "epochs": 1,  # `ppo_epochs`
        "optimizer": {"weight_decay": 0.1},  # `actor_weight_decay`
        "schedule": {"shape": "cosine", "warmup_steps": 0},  # `lr_scheduler_type`, `num_warmup_steps`
    },
}

# Zheng et al. 2025 (GSPO). Section 5.1: four updates per step. Samples per prompt: TRL 1.16 `num_generations`.
_GSPO: Tree = {
    "critic": {"kind": "none"},
    "rollout": {"samples_per_prompt": 8, "temperature": 1.0},
    "algorithm": {
        "kl": _NO_KL,  # section 2 omits the KL term
        "advantage": {"estimator": "grpo", "whiten": False},  # equation 6
        # Equations 5 and 7; clip ranges of section 5.1.
        "policy_loss": {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "loss_aggregation": "sequence"},
    },
    "train": {"learning_rate": 1e-6, "epochs": 1},  # TRL 1.16
}

# MiniMax 2025 (MiniMax-M1), section 3.1. Samples per prompt: TRL 1.16 `num_generations`.
_CISPO: Tree = {
    "critic": {"kind": "none"},
    "rollout": {"samples_per_prompt": 8, "temperature": 1.0, "refill_rounds": 10},  # dynamic sampling, as in DAPO
    "algorithm": {
        "kl": _NO_KL,  # no KL term
        "shaping": {"overlong_buffer": 0.2, "overlong_penalty": 1.0},  # length penalty, as in DAPO
        "advantage": {"estimator": "grpo", "whiten": False},  # group-relative
        # Equation 4: a mean over all tokens. Bound 1 + 4: ScaleRL (Khatri et al. 2025), TRL 1.16; the paper has no number.
        "policy_loss": {"name": "cispo", "clip_high": 4.0, "loss_aggregation": "token"},
    },
    "train": {"learning_rate": 1e-6, "epochs": 1},  # TRL 1.16
}

RECIPES: dict[str, Tree] = {
    "ppo": _PPO,
    "grpo": _GRPO,
    "dr-grpo": _DR_GRPO,
    "dapo": _DAPO,
    "rloo": _RLOO,
    "reinforce++": _REINFORCE_PP,
    "reinforce++-baseline": _REINFORCE_PP_BASELINE,
    "remax": _REMAX,
    "gspo": _GSPO,
    "cispo": _CISPO,
}
"""Trees of values by algorithm."""

_CLASSIC: dict[str, Any] = {
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

_MODERN: dict[str, Any] = {
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

PRESETS: dict[str, dict[str, Any]] = {**RECIPES, "trl-classic": _CLASSIC, "trl-modern": _MODERN}
"""Trees of values by preset name."""


def preset_tree(name: object, source: str) -> dict[str, Any]:
    """Return a preset's tree of values.

    Raises:
        UserError: no preset has that name; the message gives the nearest one.
    """
    if not isinstance(name, str) or name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(PRESETS)}"
        raise UserError(f"{source}: unknown preset {name}; {hint}")
    return PRESETS[name]


def preset_under(preset: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return a preset, without its policy loss if the settings choose another.

    The keys of one loss would be unknown to another, or be a clip range of the wrong kind.
    """
    section = settings.get("algorithm")
    chosen = section.get("policy_loss") if isinstance(section, dict) else None
    name = preset["algorithm"]["policy_loss"]["name"]
    if not isinstance(chosen, dict) or chosen.get("name", name) == name:
        return preset
    return preset | {"algorithm": {key: value for key, value in preset["algorithm"].items() if key != "policy_loss"}}
