"""Optimizers by name, and the learning-rate schedule.

The learning rate is a pure function of the optimizer step, so there is no scheduler state.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from rayrlhf.config.train import OptimizerSection, ScheduleSection


def build_optimizer(
    parameters: Iterable[nn.Parameter], section: OptimizerSection, learning_rate: float
) -> torch.optim.Optimizer:
    """Build a torch optimizer over the trainable parameters.

    Weight decay is not applied to vectors (norms and biases). torch's fused kernels are used: on a CPU they make one pass over
    memory, and nothing has to be compiled.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": section.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate)
    kind = torch.optim.AdamW if section.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=learning_rate, betas=section.betas, eps=section.epsilon, fused=True)


def learning_rate_factor(schedule: ScheduleSection, step: int, total_steps: int) -> float:
    """Return the share of the peak learning rate at an optimizer step.

    Args:
        step: optimizer steps taken before this one, >= 0.
        total_steps: optimizer steps of the whole run; the shape ends there.

    Returns:
        (step + 1) / (warmup_steps + 1) during warm-up; then 1 falling to `floor` along the shape, and `floor` after the end.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.shape == "constant":
        return 1.0
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps))
    shape = 1.0 - progress if schedule.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.floor + (1.0 - schedule.floor) * shape
