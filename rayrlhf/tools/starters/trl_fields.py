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
        "exp_name": "run.name",
        "query_dataset": "data.train.path",
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
        "router_aux_loss_coef": "train.router_aux_loss_coefficient",
        "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
        "vllm_tensor_parallel_size": "rollout.tensor_parallel_size",
        "vllm_max_model_length": "rollout.max_model_length",
        "vllm_enable_sleep_mode": "rollout.sleep",
    },
    "SFTConfig": _COMMON
    | {"max_length": "data.max_length", "packing": "train.packing", "neftune_noise_alpha": "train.neftune_alpha"},
    "RewardConfig": _COMMON | {"max_length": "data.max_length", "center_rewards_coefficient": "train.center_coefficient"},
    "DPOConfig": _COMMON
    | {"max_length": "data.max_length", "beta": "train.beta", "label_smoothing": "train.label_smoothing"}
    | {"router_aux_loss_coef": "train.router_aux_loss_coefficient"},
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
_READ = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "adam_beta1",
    "adam_beta2",
    "bf16",
    "fp16",
    "output_dir",
    "max_steps",
    "num_train_epochs",
}
GRPO: Mapping[str, tuple[str, str]] = {
    "beta": ("algorithm.kl.coefficient", "with `estimator: k3` and `placement: loss`"),
    "epsilon": ("algorithm.policy_loss.clip_low", "and `clip_high` unless `epsilon_high` is set"),
    "epsilon_high": ("algorithm.policy_loss.clip_high", "with `loss_type: cispo` it is the bound, here the bound minus 1"),
    "loss_type": (
        "algorithm.policy_loss.loss_aggregation",
        "`grpo` is `sequence`, `bnpo` and `dapo` are `token`, `dr_grpo` is `constant`; "
        "`cispo` and `sapo` are `policy_loss.name`; others are losses that are not offered: write a plugin",
    ),
    "importance_sampling_level": ("algorithm.policy_loss.name", "`token` is `ppo`, `sequence` is `gspo`"),
    "scale_rewards": (
        "algorithm.advantage.estimator",
        "`group` is `grpo`, `none` is `dr_grpo`; `batch` has no equivalent: the deviation is that of the group",
    ),
    "sapo_temperature_pos": ("algorithm.policy_loss.temperature_positive", "with `loss_type` sapo"),
    "sapo_temperature_neg": ("algorithm.policy_loss.temperature_negative", "with `loss_type` sapo"),
    "mask_truncated_completions": ("algorithm.shaping.truncated", "True is `mask`"),
    "generation_batch_size": ("rollout.prompts_per_step", "divided by `num_generations`, times devices"),
    "steps_per_generation": ("rollout.prompts_per_step", "times `per_device_train_batch_size`, divided by `num_generations`"),
    "per_device_train_batch_size": ("train.micro_batch_size", "samples of one forward pass"),
    "gradient_accumulation_steps": ("train.mini_batch_size", "times the batch per device: samples of an optimizer step"),
    "max_steps": ("run.steps", "optimizer steps in TRL; here batches, so divided by the optimizer steps of one"),
    "lr_scheduler_type": ("train.schedule.shape", "constant, linear or cosine"),
    "adam_beta1": ("train.optimizer.betas", "and `adam_beta2`"),
    "bf16": ("model.dtype", "True is `bfloat16`, False `float32`"),
    "output_dir": ("run.root", "its last part is `run.name`"),
}
"""Fields of `GRPOConfig` whose value is converted, with their key and the conversion."""
CONVERTED: Mapping[str, set[str]] = {
    "ClassicPPOConfig": _READ | {"steps", "adap_kl_ctrl", "target", "early_stopping", "target_kl", "kl_penalty", "cliprange"},
    "PPOConfig": _READ | {"total_episodes", "num_mini_batches", "cliprange"},
    "GRPOConfig": _READ | set(GRPO),
    "SFTConfig": _READ | {"loss_type"},
    "RewardConfig": _READ,
    "DPOConfig": _READ | {"loss_type"},
}
"""Fields that the conversion reads besides `KEYS`; it comments on values that it cannot convert."""
_REFERENCE = "the reference stays the initial model; begin another run with --from to renew it"
_FULL = "responses are sampled from the full distribution, because log-probs are taken of it"
REASONS = {
    "reward_weights": "set reward.functions.*.weight, one for each function",
    "reward_model": "set reward.model.model.path",
    "local_rollout_forward_batch_size": "see train.score_batch_tokens, which counts tokens",
    "num_sample_generations": "see evaluation.every",
    "num_generations_eval": "evaluations take one response to each prompt; `rayrlhf evaluate` takes several",
    "multi_objective_aggregation": "sum_then_normalize is what all estimators do but `gdpo`, which is normalize_then_sum",
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _REFERENCE),
    "top_entropy_quantile": "all tokens are trained on",
    **dict.fromkeys(
        ("use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        "the entropy coefficient is fixed: see algorithm.policy_loss.entropy_coefficient",
    ),
    "off_policy_mask_threshold": "see algorithm.off_policy_correction.mode",
    "use_bias_correction_kl": "the KL term has no importance weights; on fresh responses they are 1",
    "vllm_importance_sampling_clip_min": "see algorithm.off_policy_correction.low",
    "vllm_importance_sampling_cap": "see algorithm.off_policy_correction.high",
    "shuffle_dataset": "see data.shuffle",
    "disable_dropout": "dropout is always off, so that log-probs repeat",
    "router_aux_loss_coef": "the load-balancing loss of experts is not added",
    "cast_lm_head_to_fp32": "master weights and log-probs are float32",
    "model_init_kwargs": "see model.dtype, model.attention and model.revision",
    "chat_template_kwargs": "see model.chat_template",
    "generation_kwargs": "see rollout.stop; responses are sampled from the full distribution",
    "max_tool_calling_iterations": "see environment.max_turns",
    "remove_unused_columns": "reward functions get the columns that they name",
    "ds3_gather_for_generation": "weights travel to the replicas in buckets",
    "pad_to_multiple_of": "see train.micro_batch_tokens",
    **dict.fromkeys(
        (
            "use_vllm",
            "cache_implementation",
            "use_transformers_continuous_batching",
            "transformers_continuous_batching_config",
            "use_transformers_paged",
        ),
        "vLLM samples by default: see rollout.backend",
    ),
    "vllm_model_impl": "see rollout.arguments",
    **dict.fromkeys(
        ("vllm_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
        "replicas are actors of the run: see rollout.replicas and placement.rollout_gpus",
    ),
    **dict.fromkeys(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        "of a loss that is not offered: write a plugin",
    ),
    **dict.fromkeys(
        ("log_completions", "num_completions_to_print", "log_unique_prompts"),
        "responses are in samples/: see observe.samples_per_step and `rayrlhf report`",
    ),
    "log_multimodal": "models are text-only",
    "log_completions_hub_repo": "nothing is uploaded",
    **dict.fromkeys(("top_p", "top_k", "min_p", "repetition_penalty", "vllm_structured_outputs_regex"), _FULL),
    **dict.fromkeys(
        ("stop_token", "stop_token_id"), "the end-of-sequence token always ends a response; rollout.stop has further texts"
    ),
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
