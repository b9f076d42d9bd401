"""Optimizers by name, and the learning-rate schedule.

The learning rate is a pure function of the optimizer step, so there is no scheduler state.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from rayrlhf.config.train import OptimizerSection, ScheduleSection

RATE_FACTOR = "rate_factor"
"""Key of a parameter group: its learning rate over that of the optimizer step."""


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    section: OptimizerSection,
    learning_rate: float,
    head: Iterable[nn.Parameter] = (),
    head_learning_rate: float | None = None,
) -> torch.optim.Optimizer:
    """Build a torch optimizer over the trainable parameters.

    Weight decay is not applied to vectors (norms and biases). torch's fused kernels are used: on a CPU they make one pass over
    memory, and nothing has to be compiled.

    Args:
        head: parameters with a learning rate of their own.
        head_learning_rate: their rate; its ratio to `learning_rate` is `RATE_FACTOR` of their groups. None for the same rate.
    """
    apart = {id(parameter) for parameter in head} if head_learning_rate is not None else set()
    factor = 1.0 if head_learning_rate is None else head_learning_rate / learning_rate
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {
            "params": [one for one in trainable if (id(one) in apart) == in_head and (_dimensions(one) <= 1) == is_vector],
            "weight_decay": 0.0 if is_vector else section.weight_decay,
            RATE_FACTOR: factor if in_head else 1.0,
        }
        for in_head in (False, True)
        for is_vector in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate)
    kind = torch.optim.AdamW if section.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=learning_rate, betas=section.betas, eps=section.epsilon, fused=True)


def _dimensions(parameter: nn.Parameter) -> int:
    """Return the dimensions of the whole parameter, also where ZeRO-3 has divided it."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


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
