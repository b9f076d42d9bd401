"""TRL 1.16's own GRPO and RLOO code run on given tensors: its trainers' methods, called on a stand-in without models.

The stand-in answers what those methods ask of a trainer (generated ids, rewards, log-probs) with the tensors of a test.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

PAD = 0


class _OneProcess:
    """The part of `accelerate.Accelerator` that matters where there is one process."""

    device = torch.device("cpu")
    num_processes, process_index, sync_gradients = 1, 0, True

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


def stand_in(**settings: Any) -> SimpleNamespace:
    """A trainer's attributes, at TRL's defaults but for `settings`."""
    arguments = SimpleNamespace(
        steps_per_generation=1, gradient_accumulation_steps=1, per_device_train_batch_size=8, delta=settings.pop("delta", None),
        use_bias_correction_kl=settings.pop("use_bias_correction_kl", False), gradient_checkpointing_kwargs=None,
        sapo_temperature_pos=settings.pop("sapo_temperature_pos", 1.0),
        sapo_temperature_neg=settings.pop("sapo_temperature_neg", 1.05),
    )  # fmt: skip
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    defaults: dict[str, Any] = {
        "accelerator": _OneProcess(), "args": arguments, "model": model, "ref_model": "reference",
        "environment_factories": None, "environments": None, "tools": None, "_is_vlm": False,
        "_tokenizer": SimpleNamespace(pad_token_id=PAD),
        "pad_to_multiple_of": None, "mask_truncated_completions": False, "eos_token_ids": [1], "num_iterations": 1,
        "num_generations": 4, "reward_weights": torch.ones(1), "reward_funcs": [None], "reward_func_names": ["score"],
        "multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "group", "reward_clip_range": None,
        "normalize_advantages": False, "beta": 0.0, "use_vllm": False, "vllm_importance_sampling_correction": False,
        "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 3.0,
        "vllm_importance_sampling_clip_min": None, "log_multimodal": False, "_pending_extra_logs": {}, "_pending_metrics": {},
        "_metrics": {"train": defaultdict(list)}, "_logs": defaultdict(list, rewards=defaultdict(list)),
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "importance_sampling_level": "token",
        "loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2, "max_completion_length": 16,
        "current_gradient_accumulation_steps": 1, "_entropy_bonus_enabled": False, "use_adaptive_entropy": False,
        "entropy_coef": 0.0, "aux_loss_enabled": False,
    }  # fmt: skip
    return SimpleNamespace(**(defaults | settings))


def trl_experience(
    trainer: type[GRPOTrainer] | type[RLOOTrainer],
    rewards: Tensor,
    mask: Tensor,
    logprobs: Tensor,
    *,
    reference: Tensor | None = None,
    sampler: Tensor | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """What TRL makes of sampled responses before its update: advantages [B], importance ratios, masks.

    Args:
        trainer: whose `_generate_and_score_completions`.
        rewards: float [B], or [B, K] of K functions, NaN for a response that no function could score; groups are consecutive.
        mask: bool [B, T] without holes.
        logprobs: float [B, T], of the policy.
        reference: float [B, T].
        sampler: float [B, T], switches the correction of the sampler's log-probs on.
        settings: attributes of the trainer.
    """
    lengths = mask.sum(1).tolist()
    completions = [[2] * length for length in lengths]
    if sampler is not None:
        settings |= {"use_vllm": True, "vllm_importance_sampling_correction": True}
    self = stand_in(**settings)
    prompts = [[3]] * len(lengths)
    taken = None if sampler is None else [row[:length].tolist() for row, length in zip(sampler, lengths, strict=True)]
    generated: tuple[Any, ...] = (prompts, completions, None, completions, taken, {}, None, None)
    self._generate = lambda _: generated if trainer is GRPOTrainer else (prompts, completions, completions)
    self._calculate_rewards = lambda *_: (rewards if rewards.dim() == 2 else rewards[:, None]).clone()
    width = max(lengths)

    def logps(model: Any, *_: Any, **__: Any) -> tuple[Tensor | None, None, None]:
        return (reference if model == "reference" else logprobs)[:, :width], None, None

    self._get_per_token_logps_and_entropies = logps
    # Accelerate's function asks for the process group of any test before this one in the same process.
    with patch(f"{trainer.__module__}.gather_object", lambda items: items):
        made: dict[str, Tensor] = trainer._generate_and_score_completions(self, [{"prompt": "p"} for _ in lengths])
    return made


def trl_loss(
    mask: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    entropy: Tensor | None = None,
    trainer: type[GRPOTrainer] | None = None,
    **arrays_and_settings: Any,
) -> Tensor:
    """The scalar of `GRPOTrainer._compute_loss`, or of a subclass, on given per-token log-probs [B, T].

    `reference` and `importance_sampling_ratio` [B, T] or [B, 1] are arrays; everything else is an attribute of the trainer.
    """
    settings = dict(arrays_and_settings)
    reference, ratio = settings.pop("reference", None), settings.pop("importance_sampling_ratio", None)
    if ratio is not None:
        settings |= {"use_vllm": True, "vllm_importance_sampling_correction": True}
    self = stand_in(**settings)
    own_entropy = torch.zeros_like(logprobs) if entropy is None else entropy
    self._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, own_entropy, None)
    one = torch.ones(len(mask), 1, dtype=torch.long)
    inputs = {
        "prompt_ids": one, "prompt_mask": one, "completion_ids": mask.long(), "completion_mask": mask.to(logprobs.dtype),
        "advantages": advantages, "old_per_token_logps": old_logprobs, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    if reference is not None:
        inputs["ref_per_token_logps"] = reference
    if ratio is not None:
        inputs["importance_sampling_ratio"] = ratio
    loss: Tensor = (trainer or GRPOTrainer)._compute_loss(self, None, inputs)
    return loss
