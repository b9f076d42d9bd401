"""Updates of a train engine: batches, optimizer, schedule, sharding."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a moving average."""


class OptimizerSection(Section):
    """The optimizer of one model."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimizer. `adamw` decouples weight decay from the gradient; `adam` adds it to the gradient."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of the first and second moments of the gradient. No effect on `sgd`."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the square root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay per step, multiplied by the learning rate."""


class ScheduleSection(Section):
    """Learning rate over optimizer steps: linear warm-up, then `shape`, down to `floor`."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the learning-rate warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Learning-rate warm-up: optimizer steps in which the rate rises linearly from 0."""
    floor: float = Field(0.0, ge=0, le=1)
    """Final learning rate, as a share of the peak."""


class TrainSection(Section):
    """Update of one step: `epochs` passes over its experience, in mini-batches."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of the schedule."""
    epochs: int = Field(1, ge=1)
    """Passes over the experience of a step."""
    mini_batch_size: int | None = Field(None, ge=1)
    """Samples per optimizer step, over all ranks; must divide the samples of a step. Default: all of them."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples per forward and backward pass on one rank. Default: set by `micro_batch_tokens`."""
    micro_batch_tokens: int = Field(4096, ge=1)
    """Maximum tokens of one forward and backward pass on one rank, padding included."""
    score_batch_tokens: int = Field(8192, ge=1)
    """Maximum tokens of one forward pass without gradient, padding included."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Maximum norm of the whole gradient; larger ones are scaled down. null does not clip."""
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage, sharding over the ranks: 0 nothing, 1 optimizer states, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep optimizer states in main memory. Needs `zero_stage` 1, 2 or 3."""
    early_stop_kl: float | None = Field(None, gt=0)
    """End the passes of a step once the KL from the policy that sampled exceeds 1.5 times this, in nats per token (TRL
    `target_kl`). Default: never."""
    ratio_guard: float | None = Field(None, gt=1)
    """Zero the loss of a mini-batch whose mean ratio exceeds this (TRL `ratio_threshold`). Default: never."""
    max_nonfinite_steps: int = Field(3, ge=0)
    """Optimizer steps in a row that may be skipped because the gradient has inf or NaN; one more stops the run."""

    ema_decay: float | None = Field(None, ge=0, lt=1)
    """Decay per step of a moving average of the policy's weights, exported to `export-average` in addition to the policy.
    Default: no average."""

    @property
    def all_ranks_must_forward(self) -> bool:
        """True if parameters are sharded, so that every rank must run the same forward passes."""
        return self.zero_stage == 3

    @property
    def sharding_label(self) -> str:
        """Sharding in words, for plans and logs."""
        return f"ZeRO stage {self.zero_stage}"

    def sharding_fingerprint(self) -> dict[str, int]:
        """Settings, by key, that two runs must share to load each other's training state."""
        return {"train.zero_stage": self.zero_stage}

    @model_validator(mode="after")
    def _check_ema(self) -> Self:
        if self.ema_decay is not None and self.zero_stage == 3:
            raise ValueError(f"ema_decay {self.ema_decay:g} needs whole weights on a rank: expected zero_stage 0, 1 or 2")
        return self

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        return self
