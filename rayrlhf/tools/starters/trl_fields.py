"""Fields of TRL's configurations and their keys here.

Names and defaults are those of TRL 1.16, and of TRL 1.12 and 0.11 for the two forms of `PPOConfig`.
"""

from collections.abc import Mapping
from typing import Any

TASKS = {
    "ClassicPPOConfig": "ppo",
    "PPOConfig": "ppo",
    "GRPOConfig": "ppo",
    "SFTConfig": "sft",
    "RewardConfig": "reward",
    "DPOConfig": "dpo",
}
"""Class -> task. `ClassicPPOConfig` is the `PPOConfig` of TRL up to 0.11."""
SIGNS = {
    "ClassicPPOConfig": {"ppo_epochs", "init_kl_coef", "adap_kl_ctrl", "mini_batch_size", "batch_size", "model_name"},
    "PPOConfig": {"num_ppo_epochs", "kl_coef", "total_episodes", "response_length", "sft_model_path", "cliprange"},
}
"""Fields that distinguish the configurations of the task ppo."""

_COMMON = {
    "learning_rate": "train.learning_rate",
    "max_grad_norm": "train.max_grad_norm",
    "weight_decay": "train.optimizer.weight_decay",
    "adam_epsilon": "train.optimizer.epsilon",
    "warmup_steps": "train.schedule.warmup_steps",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "trust_remote_code": "model.trust_remote_code",
    "seed": "run.seed",
    "run_name": "run.name",
    "eval_steps": "evaluation.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
}
_PPO = {
    "gamma": "algorithm.advantage.gamma",
    "lam": "algorithm.advantage.lam",
    "vf_coef": "algorithm.value_loss.coefficient",
    "cliprange_value": "algorithm.value_loss.clip",
    "whiten_rewards": "algorithm.shaping.whiten_rewards",
}
KEYS: Mapping[str, Mapping[str, str]] = {
    "ClassicPPOConfig": _PPO
    | {
        "learning_rate": "train.learning_rate",
        "max_grad_norm": "train.max_grad_norm",
        "gradient_checkpointing": "model.gradient_checkpointing",
        "seed": "run.seed",
        "model_name": "model.path",
        "batch_size": "rollout.prompts_per_step",
        "mini_batch_size": "train.micro_batch_size",
        "init_kl_coef": "algorithm.kl.coefficient",
        "horizon": "algorithm.kl.horizon",
        "ppo_epochs": "train.epochs",
        "ratio_threshold": "train.ratio_guard",
        "use_score_scaling": "algorithm.shaping.scale",
        "use_score_norm": "algorithm.shaping.center",
        "score_clip": "algorithm.shaping.clip",
    },
    "PPOConfig": _COMMON
    | _PPO
    | {
        "sft_model_path": "model.path",
        "reward_model_path": "reward.model.model.path",
        "response_length": "rollout.max_new_tokens",
        "temperature": "rollout.temperature",
        "missing_eos_penalty": "algorithm.shaping.missing_eos_penalty",
        "kl_coef": "algorithm.kl.coefficient",
        "kl_estimator": "algorithm.kl.estimator",
        "num_ppo_epochs": "train.epochs",
    },
    "GRPOConfig": _COMMON
    | {
        "num_generations": "rollout.samples_per_prompt",
        "max_completion_length": "rollout.max_new_tokens",
        "temperature": "rollout.temperature",
        "num_iterations": "train.epochs",
        "entropy_coef": "algorithm.policy_loss.entropy_coefficient",
        "delta": "algorithm.policy_loss.dual_clip",
        "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
        "vllm_tensor_parallel_size": "rollout.tensor_parallel_size",
        "vllm_max_model_length": "rollout.max_model_length",
        "vllm_enable_sleep_mode": "rollout.sleep",
    },
    "SFTConfig": _COMMON
    | {"max_length": "data.max_length", "packing": "train.packing", "neftune_noise_alpha": "train.neftune_alpha"},
    "RewardConfig": _COMMON | {"max_length": "data.max_length", "center_rewards_coefficient": "train.center_coefficient"},
    "DPOConfig": _COMMON | {"max_length": "data.max_length", "beta": "train.beta", "label_smoothing": "train.label_smoothing"},
}
"""Fields whose value is the key's value."""

_BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "lr_scheduler_type": "linear"}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ClassicPPOConfig": {},  # the preset trl-classic has them
    "PPOConfig": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},  # and trl-modern those
    "GRPOConfig": _BATCH
    | {
        "learning_rate": 1e-6,
        "num_generations": 8,
        "max_completion_length": 512,
        "num_iterations": 1,
        "beta": 0.0,
        "epsilon": 0.2,
        "loss_type": "dapo",
        "scale_rewards": "group",
    },
    "SFTConfig": _BATCH | {"learning_rate": 2e-5, "num_train_epochs": 3.0, "max_length": 1024},
    "RewardConfig": _BATCH | {"learning_rate": 1e-4, "num_train_epochs": 3.0, "max_length": 1024},
    "DPOConfig": _BATCH | {"learning_rate": 1e-6, "num_train_epochs": 3.0, "max_length": 1024, "beta": 0.1},
}
"""Defaults of TRL where those of this package differ."""
READ = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "adam_beta1",
    "adam_beta2",
    "bf16",
    "fp16",
    "output_dir",
    "max_steps",
}
"""Fields that the conversion reads besides `KEYS`, or that need nothing."""
REASONS = {
    "reward_weights": "set reward.functions.*.weight, one for each function",
    "top_p": "responses are sampled from the full distribution, because log-probs are taken of it",
    "top_k": "responses are sampled from the full distribution, because log-probs are taken of it",
    "min_p": "responses are sampled from the full distribution, because log-probs are taken of it",
    "repetition_penalty": "responses are sampled from the full distribution, because log-probs are taken of it",
    "stop_token": "the end-of-sequence token always ends a response; rollout.stop has further texts",
    "stop_token_id": "the end-of-sequence token always ends a response; rollout.stop has further texts",
    "dataset_text_field": "set data.train.prompt_field and data.train.completion_field",
    "vllm_importance_sampling_correction": "see algorithm.off_policy_correction",
    "vllm_importance_sampling_mode": "see algorithm.off_policy_correction.level and mode",
    "vllm_importance_sampling_clip_max": "see algorithm.off_policy_correction.high",
    "report_to": "see observe.trackers; TensorBoard files are always written",
    "logging_steps": "each step is logged",
    "deepspeed": "see train.zero_stage and train.offload_optimizer",
    "fsdp": "see train.zero_stage",
}
"""Reasons and hints for fields without a key of the same meaning."""
