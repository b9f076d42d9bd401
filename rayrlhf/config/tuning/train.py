"""Training of SFT, reward models and DPO: length, batches, optimizer."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section
from rayrlhf.config.train import OptimizerSection, ScheduleSection, TrainSection

Count = Annotated[int, Field(ge=1)]
DEFAULT_BATCH_SIZE = 32


class TuningTrainSection(Section):
    """Passes over the data in optimizer steps of a number of samples or tokens.

    For reward models and DPO a sample is a pair.
    """

    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate of the schedule."""
    epochs: int = Field(1, ge=1)
    """Passes over the training data."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps of the run, in place of `epochs`; the data is repeated as needed. Default: set by `epochs`."""
    batch_size: int | None = Field(None, ge=1)
    """Samples per optimizer step, over all workers. Default: 32, unless `batch_tokens` is set."""
    batch_tokens: int | None = Field(None, ge=1)
    """Maximum tokens per optimizer step, over all workers, in place of `batch_size`."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples per forward and backward pass on one worker. Default: set by `micro_batch_tokens`."""
    micro_batch_tokens: int = Field(4096, ge=1)
    """Maximum tokens of one forward and backward pass on one worker, padding included; with `packing` the size of a pack."""
    packing: bool = False
    """Concatenate samples instead of padding them, without attention between them. Loss and gradients are the same."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Maximum norm of the whole gradient; larger ones are scaled down. null does not clip."""
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage, sharding over the workers: 0 nothing, 1 optimizer states, 2 also gradients, 3 also parameters."""
    offload_optimizer: bool = False
    """Keep optimizer states in main memory. Needs `zero_stage` 1, 2 or 3."""

    @property
    def samples_per_step(self) -> int | None:
        """Samples per optimizer step; None with `batch_tokens`."""
        return None if self.batch_tokens is not None else self.batch_size or DEFAULT_BATCH_SIZE

    @property
    def sharding_label(self) -> str:
        """Sharding in words, for plans and logs."""
        return self.engine_section().sharding_label

    def engine_section(self) -> TrainSection:
        """Return the train engine's section: one pass per batch, in one optimizer step."""
        names = ("learning_rate", "micro_batch_size", "micro_batch_tokens", "max_grad_norm", "zero_stage", "offload_optimizer")
        values = {name: getattr(self, name) for name in names}
        return TrainSection(**values, optimizer=self.optimizer, schedule=self.schedule)

    @model_validator(mode="after")
    def _check_batch_size(self) -> Self:
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ValueError("batch_size and batch_tokens are both given: expected one of them")
        if self.packing and self.micro_batch_size is not None:
            raise ValueError("micro_batch_size has no effect with packing, where micro_batch_tokens is the size of a pack")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        return self


class SupervisedTrainSection(TuningTrainSection):
    """Training of SFT."""

    neftune_alpha: float | None = Field(None, gt=0)
    """Noise on the embeddings in training, uniform in +-alpha / sqrt(tokens x width) (Jain et al. 2023). Default: none."""


class DistillationTrainSection(SupervisedTrainSection):
    """Training of a student on its teacher's distributions."""

    vocabulary: Count | Literal["full"] = "full"
    """Compared tokens: `full`, or the n most likely of the teacher, with the rest of its mass as one. On disk a response token
    takes a hidden state with `full`, else 8 n bytes."""


class RewardTrainSection(TuningTrainSection):
    """Training of a reward model."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of the schedule."""
    center_coefficient: float = Field(0.0, ge=0)
    """Weight of (chosen + rejected)^2, which keeps rewards around 0 (TRL `center_rewards_coefficient`, usually 0.01)."""
    head_init: Literal["normal", "zero", "default"] = "normal"
    """Initialization of a new scalar head: `zero`, `normal` N(0, 1/(hidden+1)), or `default`, torch's own for Linear."""


class DirectPreferenceTrainSection(TuningTrainSection):
    """Training of a policy on pairs (DPO)."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of the schedule."""
    loss: Literal["sigmoid", "robust", "ipo"] = "sigmoid"
    """Loss of a pair. `sigmoid`: DPO. `robust`: its unbiased form for wrong labels. `ipo`: the squared loss of mean
    log-ratios."""
    beta: float = Field(0.1, gt=0)
    """Strength of the KL constraint to the reference; tau of IPO."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the labels assumed wrong. With `sigmoid` this is conservative DPO."""
    reference: Literal["initial", "none"] = "initial"
    """Reference model. `initial`: the initial policy, scored once on all pairs. `none`: no reference."""

    @model_validator(mode="after")
    def _check_ipo(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(f"label_smoothing {self.label_smoothing:g} has no effect on loss ipo; expected sigmoid or robust")
        return self
