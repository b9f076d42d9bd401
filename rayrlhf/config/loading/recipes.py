"""Recipes of published algorithms, for a configuration file with a top-level `preset:` key.

A recipe holds the keys that make the algorithm: estimator, KL, loss, aggregation, samples per prompt, passes. Models, data,
lengths and batch sizes belong to the run; where a paper's clip range needs several updates per step, the comment gives its
number. Values without a paper come from the named code. `learning_rate` is for full fine-tuning of models of 1B parameters or
more.
"""

from typing import Any

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
