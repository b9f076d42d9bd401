"""How a train engine updates a model: batches, optimizer, schedule, sharding."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section

Decay = Annotated[float, Field(ge=0, lt=1)]
"""The decay rate of a moving average."""


class OptimizerSection(Section):
    """The optimizer of one model."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """`adamw` decays weights apart from the gradient, `adam` through it."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of the gradient's mean and of its square's."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Share of a weight that a step takes off, times the learning rate."""


class ScheduleSection(Section):
    """The learning rate over optimizer steps: linear warm-up, then the shape, down to `floor` x the peak."""

    shape: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps in which it rises from 0."""
    floor: float = Field(0.0, ge=0, le=1)
    """Share of the peak that is left at the end."""


class TrainSection(Section):
    """One PPO step makes `epochs` passes over the experience, in optimizer steps of `mini_batch_size` samples."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak of the schedule."""
    epochs: int = Field(1, ge=1)
    """Passes over the experience of a step."""
    mini_batch_size: int | None = Field(None, ge=1)
    """Samples per optimizer step over all ranks; the whole step's samples when not given."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples per forward and backward on one rank; `micro_batch_tokens` decides when not given."""
    micro_batch_tokens: int = Field(4096, ge=1)
    """Token budget, padding included, of one forward and backward on one rank."""
    score_batch_tokens: int = Field(8192, ge=1)
    """Token budget of one forward without gradient."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the norm of the whole gradient to this; null clips nothing."""
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed shards over the ranks: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in main memory."""
    early_stop_kl: float | None = Field(None, gt=0)
    """Stop the epochs of a step once the policy moved further than 1.5 x this from the sampling policy (TRL `target_kl`)."""
    ratio_guard: float | None = Field(None, gt=1)
    """Zero the loss of a mini-batch whose mean ratio exceeds this (TRL `ratio_threshold`)."""
    max_nonfinite_steps: int = Field(3, ge=0)
    """Optimizer steps in a row that may be skipped because the gradient has inf or NaN; one more stops the run."""

    ema_decay: float | None = Field(None, ge=0, lt=1)
    """Keep a moving average of the policy's weights, of which a step keeps this share, and export it beside the policy, in
    `export-average`; no average when not given."""

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
