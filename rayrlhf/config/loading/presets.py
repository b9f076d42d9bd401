"""Presets: trees of values under a configuration file with a top-level `preset:` key.

A recipe of a published algorithm holds the keys that make it: estimator, KL, loss, aggregation, samples per prompt, passes.
Models, data, lengths and batch sizes belong to the run; where a paper's clip range needs several updates per step, the comment
gives its number. Values without a paper come from the named code. `learning_rate` is for full fine-tuning of models of 1B
parameters or more.

Those of TRL's PPO trainers are in `trl_presets`.
"""

import difflib
from typing import Any

from rayrlhf.config.loading.trl_presets import CLASSIC, MODERN
from rayrlhf.errors import UserError

Tree = dict[str, Any]
_NO_KL: Tree = {"coefficient": 0.0}
_PER_TOKEN: Tree = {"name": "ppo", "clip_low": 0.2, "clip_high": 0.2, "loss_aggregation": "token"}
_PER_RESPONSE: Tree = _PER_TOKEN | {"loss_aggregation": "constant", "loss_aggregation_length": 1}
"""The response is one action, so its token losses are summed and only responses are averaged."""


def _group_recipe(estimator: str, policy_loss: Tree, *, samples: int = 8, rate: float = 1e-6, **algorithm: Tree) -> Tree:
    """Return a recipe without critic, KL and whitening: one pass over several responses."""
    return {
        "critic": {"kind": "none"},
        "rollout": {"samples_per_prompt": samples, "temperature": 1.0},
        "algorithm": {
            "kl": _NO_KL,
            "advantage": {"estimator": estimator, "whiten": False},
            "policy_loss": policy_loss,
            **algorithm,
        },
        "train": {"learning_rate": rate, "epochs": 1},
    }


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
        "policy_loss": _PER_TOKEN,  # equation 7
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
        "policy_loss": _PER_TOKEN | {"loss_aggregation": "sequence"},
    },
    "train": {"learning_rate": 1e-6, "epochs": 1},  # section 4.2: 1e-6, a single update per exploration stage
}

# Liu et al. 2025 ("Understanding R1-Zero-Like Training"), numbers of its experiments.
# Section 2: no reference model for rule-based rewards. Section 3.2: no division by the standard deviation, and a constant
# divisor, here rollout.max_new_tokens.
_DR_GRPO: Tree = _group_recipe("dr_grpo", _PER_TOKEN | {"loss_aggregation": "constant"})

# Yu et al. 2025 (DAPO), section 4.1 for numbers, section 2.3 for the missing KL. 512 prompts, 16 updates per step.
_DAPO: Tree = _group_recipe(
    "grpo",  # equation 9
    _PER_TOKEN | {"clip_high": 0.28},  # section 3.1, clip-higher; section 3.3, equation 12: a mean over all tokens
    samples=16,
    shaping={"overlong_buffer": 0.2, "overlong_penalty": 1.0},  # equation 13: 4096 of 20480 tokens
)
_DAPO["rollout"]["refill_rounds"] = 10  # section 3.2 samples until the step is full; verl's recipe: at most 10 batches

# Ahmadian et al. 2024 ("Back to Basics"), numbers of TRL 1.16 `RLOOConfig`.
_RLOO: Tree = {
    "critic": {"kind": "none"},
    "rollout": {"samples_per_prompt": 2, "temperature": 1.0},  # `num_generations`; the paper takes 2 and 4
    "algorithm": {
        "kl": {"estimator": "k1", "placement": "reward", "coefficient": 0.05, "target": None},  # `beta`
        "advantage": {"estimator": "rloo", "whiten": False},  # `normalize_advantages`
        "policy_loss": _PER_RESPONSE,  # `epsilon`; without effect in the only update of a step
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
        "policy_loss": _PER_TOKEN,  # PPO's clip
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
        "policy_loss": _PER_TOKEN,
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
        # As in RLOO. The paper has no clip, and in the only update of a step it has no effect.
        "policy_loss": _PER_RESPONSE,
    },
    "train": {
        "learning_rate": 1e-6,  # `actor_learning_rate`
        "epochs": 1,  # `ppo_epochs`
        "optimizer": {"weight_decay": 0.1},  # `actor_weight_decay`
        "schedule": {"shape": "cosine", "warmup_steps": 0},  # `lr_scheduler_type`, `num_warmup_steps`
    },
}

# Zheng et al. 2025 (GSPO). Section 5.1: four updates per step. Samples per prompt: TRL 1.16 `num_generations`.
# Section 2 omits the KL term. Advantages: equation 6; loss: equations 5 and 7, clips of section 5.1. Learning rate: TRL 1.16.
_GSPO: Tree = _group_recipe("grpo", {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "loss_aggregation": "sequence"})

# MiniMax 2025 (MiniMax-M1), section 3.1. Samples per prompt: TRL 1.16 `num_generations`.
# No KL term. Length penalty and dynamic sampling as in DAPO. Equation 4: a mean over all tokens. Bound 1 + 4: ScaleRL (Khatri
# et al. 2025), TRL 1.16; the paper has no number. Learning rate: TRL 1.16.
_CISPO: Tree = _group_recipe(
    "grpo",
    {"name": "cispo", "clip_high": 4.0, "loss_aggregation": "token"},
    shaping={"overlong_buffer": 0.2, "overlong_penalty": 1.0},
)
_CISPO["rollout"]["refill_rounds"] = 10

# Gao et al. 2025 (SAPO). Its runs take several updates per step. Samples per prompt and learning rate: TRL 1.16.
# Temperatures of the paper; a mean over each response, then over responses.
_SAPO: Tree = _group_recipe(
    "grpo",
    {"name": "sapo", "temperature_positive": 1.0, "temperature_negative": 1.05, "loss_aggregation": "sequence"},
)

# Zhao et al. 2025 (GMPO). Samples per prompt and learning rate: TRL 1.16.
# The clip range is (e^-0.4, e^0.4).
_GMPO: Tree = _group_recipe("grpo", {"name": "gmpo", "clip_low": 0.4, "clip_high": 0.4, "loss_aggregation": "sequence"})

# Qi et al. 2026 (DPPO); numbers of the authors' run_qwen30b_dppo.sh. Samples per prompt: TRL 1.16 `num_generations`.
# The divergence is the binary TV.
_DPPO: Tree = _group_recipe("grpo", {"name": "dppo", "divergence": "tv", "threshold": 0.15, "loss_aggregation": "token"})

# Le Roux et al. 2025 (TOPR), canonical form; the reward minus the group's mean. Samples per prompt: TRL 1.16.
# The taper bounds the update, without KL.
_TOPR: Tree = _group_recipe("dr_grpo", {"name": "topr", "weight_high": 1.0, "loss_aggregation": "constant"})

# Cui et al. 2025 ("The Entropy Mechanism of Reinforcement Learning"), numbers for 7B; 8 rollouts per prompt, 8 updates per
# step.
_CLIP_COV: Tree = _group_recipe(
    "grpo",
    {"name": "clip_cov", "share": 2e-4, "cov_low": 1.0, "cov_high": 5.0, "loss_aggregation": "token"},
    rate=5e-7,
)

# Cui et al. 2025, the form with a penalty; numbers for 7B, with those of `clip-cov` for the rest.
_KL_COV: Tree = _group_recipe("grpo", {"name": "kl_cov", "share": 2e-3, "penalty": 1.0, "loss_aggregation": "token"}, rate=5e-7)

# Hao et al. 2025 (OPO): exact on-policy training, one update per step, without KL; the clip is never reached.
_OPO: Tree = _group_recipe("opo", _PER_TOKEN)

# Tajwar et al. 2026 (MaxRL): rewards of 0 and 1. Samples per prompt and learning rate: TRL 1.16.
_MAXRL: Tree = _group_recipe("maxrl", _PER_TOKEN)

# Liu et al. 2026 (GDPO): several rewards. Loss and numbers of TRL 1.16 `GRPOConfig`.
_GDPO: Tree = _group_recipe("gdpo", _PER_TOKEN)

# Ling Team 2025 (IcePop): GRPO with a double-sided mask of tokens on which trainer and rollout engine differ.
_ICEPOP: Tree = _group_recipe(
    "grpo",
    _PER_TOKEN,
    off_policy_correction={"level": "token", "mode": "mask", "low": 0.5, "high": 5.0},  # alpha and beta
)

# Yuan et al. 2025 (VC-PPO, arXiv 2503.01491): PPO without KL. The paper's critic starts from a reward model: `critic.model`.
_VC_PPO: Tree = {
    "critic": {"kind": "separate", "pretrain_steps": 100, "learning_rate": 2e-6},  # value pretraining; the critic's rate
    "rollout": {"samples_per_prompt": 1, "temperature": 1.0},
    "algorithm": {
        "kl": _NO_KL,
        "advantage": {
            "estimator": "gae",
            "gamma": 1.0,
            "lam": 0.95,  # lambda of the actor
            "critic_lam": 1.0,  # decoupled GAE
            "whiten": True,  # as in `ppo`; the paper names none
        },
        "policy_loss": _PER_TOKEN,
    },
    "train": {"learning_rate": 1e-6, "epochs": 1},  # the actor's rate
}

# Yue et al. 2025 (VAPO, arXiv 2504.05118). 512 prompts, 16 updates per step.
_VAPO: Tree = {
    "critic": {"kind": "separate", "pretrain_steps": 50, "learning_rate": 2e-6},  # value-pretraining; rates as in VC-PPO
    "rollout": {"samples_per_prompt": 16, "temperature": 1.0},  # group sampling
    "algorithm": {
        "kl": _NO_KL,
        "advantage": {
            "estimator": "gae",
            "gamma": 1.0,
            "lam_alpha": 0.05,  # length-adaptive GAE
            "critic_lam": 1.0,  # decoupled GAE
            "whiten": True,  # as in `ppo`; the paper names none
        },
        # Clip-higher, a mean over all tokens, and the language-model loss of positive examples.
        "policy_loss": _PER_TOKEN | {"clip_high": 0.28, "positive_coefficient": 0.1},
    },
    "train": {"learning_rate": 1e-6, "epochs": 1},
}

RECIPES: dict[str, Tree] = {
    "ppo": _PPO,
    "vc-ppo": _VC_PPO,
    "vapo": _VAPO,
    "grpo": _GRPO,
    "dr-grpo": _DR_GRPO,
    "dapo": _DAPO,
    "rloo": _RLOO,
    "reinforce++": _REINFORCE_PP,
    "reinforce++-baseline": _REINFORCE_PP_BASELINE,
    "remax": _REMAX,
    "gspo": _GSPO,
    "cispo": _CISPO,
    "sapo": _SAPO,
    "gmpo": _GMPO,
    "dppo": _DPPO,
    "topr": _TOPR,
    "clip-cov": _CLIP_COV,
    "kl-cov": _KL_COV,
    "opo": _OPO,
    "maxrl": _MAXRL,
    "gdpo": _GDPO,
    "icepop": _ICEPOP,
}
"""Trees of values by algorithm."""

# Lu and Thinking Machines Lab 2025 ("On-Policy Distillation"), numbers of their cookbook: coefficient 1, discount 0, 4 samples
# per prompt, one update per step. The teacher is `teacher.model`; rewards are only reported.
_OPD: Tree = {
    "critic": {"kind": "none"},
    "teacher": {"coefficient": 1.0, "discount": 0.0},  # `kl_penalty_coef`, `kl_discount_factor`
    "rollout": {"samples_per_prompt": 4, "temperature": 1.0},  # `group_size`
    "algorithm": {
        "kl": _NO_KL,
        "advantage": {"estimator": "distillation", "whiten": False},
        "policy_loss": _PER_TOKEN,  # never reached
    },
    "train": {"epochs": 1},
}

# Agarwal et al. 2024 (GKD), on-policy: one sample per prompt at temperature 1 (section 4), beta 0.5 as in TRL 1.16 `GKDConfig`,
# the loss on own samples alone. The number of tokens sent by the teacher is ours.
_GKD: Tree = _OPD | {
    "teacher": {"coefficient": 1.0, "divergence": {"beta": 0.5, "vocabulary": 64, "student_share": 1.0}},
    "rollout": {"samples_per_prompt": 1, "temperature": 1.0},
}

# Guo et al. 2024 (online DPO): pairs of two samples; numbers of TRL 1.16 `OnlineDPOConfig`.
_ONLINE_DPO: Tree = {
    "critic": {"kind": "none"},
    "rollout": {"samples_per_prompt": 2, "temperature": 0.9},  # `temperature`
    "algorithm": {
        "kl": _NO_KL,  # beta of the pairs' loss is the KL constraint
        "advantage": {"estimator": "pairs", "whiten": False},
        "online_dpo": {"loss": "sigmoid", "beta": 0.1},  # `loss_type`, `beta`
    },
    "train": {"learning_rate": 5e-7, "epochs": 1},  # `learning_rate`
}

# Xie et al. 2024 (XPO): each second sample is the reference's; numbers of TRL 0.24 `XPOConfig`.
_XPO: Tree = _ONLINE_DPO | {
    "rollout": {"backend": "transformers", "samples_per_prompt": 2, "temperature": 0.9},  # `temperature`
    "algorithm": _ONLINE_DPO["algorithm"] | {"online_dpo": {"variant": "xpo", "loss": "sigmoid", "beta": 0.1, "alpha": 1e-5}},
}

# Munos et al. 2024 (Nash-MD): each second sample is that of the mixture; numbers of TRL 0.24 `NashMDConfig`.
_NASH_MD: Tree = _XPO | {
    "algorithm": _ONLINE_DPO["algorithm"] | {"online_dpo": {"variant": "nash_md", "beta": 0.1, "mixture": 0.5}},
}

PRESETS: dict[str, dict[str, Any]] = {
    **RECIPES,
    "opd": _OPD,
    "gkd": _GKD,
    "online-dpo": _ONLINE_DPO,
    "xpo": _XPO,
    "nash-md": _NASH_MD,
    "trl-classic": CLASSIC,
    "trl-modern": MODERN,
}
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
    name = preset["algorithm"].get("policy_loss", {}).get("name")
    if not isinstance(chosen, dict) or chosen.get("name", name) == name:
        return preset
    return preset | {"algorithm": {key: value for key, value in preset["algorithm"].items() if key != "policy_loss"}}
