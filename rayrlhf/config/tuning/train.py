"""How long SFT and reward modelling train, in which batches, and with what optimizer."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section
from rayrlhf.config.train import OptimizerSection, ScheduleSection, TrainSection

Count = Annotated[int, Field(ge=1)]
DEFAULT_BATCH_SIZE = 32


class TuningTrainSection(Section):
    """Passes over the data in optimizer steps of a number of samples, or of tokens; for rewards a sample is a pair."""

    learning_rate: float = Field(2e-5, gt=0)
    """Peak of the schedule."""
    epochs: int = Field(1, ge=1)
    """Passes over the training data."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps of the run, whatever `epochs` says; the data is passed over as often as needed."""
    batch_size: int | None = Field(None, ge=1)
    """Samples per optimizer step over all workers; 32 when neither this nor `batch_tokens` is given."""
    batch_tokens: int | None = Field(None, ge=1)
    """Most tokens per optimizer step over all workers, in place of `batch_size`."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples per forward and backward on one worker; `micro_batch_tokens` decides when not given."""
    micro_batch_tokens: int = Field(4096, ge=1)
    """Token budget, padding included, of one forward and backward on one worker; with `packing` the size of a pack."""
    packing: bool = False
    """Lay samples end to end instead of padding them, without attention between them; loss and gradients are the same."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the norm of the whole gradient to this; null clips nothing."""
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed shards over the workers: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in main memory."""

    @property
    def samples_per_step(self) -> int | None:
        """Samples of an optimizer step; None where `batch_tokens` decides."""
        return None if self.batch_tokens is not None else self.batch_size or DEFAULT_BATCH_SIZE

    @property
    def sharding_label(self) -> str:
        """Sharding in words, for plans and logs."""
        return self.engine_section().sharding_label

    def engine_section(self) -> TrainSection:
        """Return what a train engine reads: one pass over the batch it is given, in one optimizer step."""
        names = ("learning_rate", "micro_batch_size", "micro_batch_tokens", "max_grad_norm", "zero_stage", "offload_optimizer")
        values = {name: getattr(self, name) for name in names}
        return TrainSection(**values, optimizer=self.optimizer, schedule=self.schedule)

    @model_validator(mode="after")
    def _check_batch_size(self) -> Self:
        if self.batch_size is not None and self.batch_tokens is not None:
            raise ValueError("batch_size and batch_tokens are both given; an optimizer step has one size")
        if self.packing and self.micro_batch_size is not None:
            raise ValueError("micro_batch_size is of no use with packing, where micro_batch_tokens is the size of a pack")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        return self


class SupervisedTrainSection(TuningTrainSection):
    """Training of SFT."""

    neftune_alpha: float | None = Field(None, gt=0)
    """Noise on the embeddings in training: uniform in +-alpha / sqrt(tokens x width) (Jain et al. 2023); none if not given."""


class DistillationTrainSection(SupervisedTrainSection):
    """Training of a student on what a teacher said."""

    vocabulary: Count | Literal["full"] = "full"
    """Tokens whose probabilities are compared: all, or the teacher's most likely n and the rest of its mass as one. On
    disk a response token takes a hidden state for `full`, and 8 n bytes else."""


class RewardTrainSection(TuningTrainSection):
    """Training of a reward model."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak of the schedule."""
    center_coefficient: float = Field(0.0, ge=0)
    """Weight of (chosen + rejected)^2, which keeps rewards around 0 (TRL `center_rewards_coefficient`; 0.01 is usual)."""
    head_init: Literal["normal", "zero", "default"] = "normal"
    """A new scalar head: `normal` draws N(0, 1/(hidden+1)), `default` is torch's Linear initialisation."""


class DirectPreferenceTrainSection(TuningTrainSection):
    """Training of a policy on pairs (DPO)."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak of the schedule."""
    loss: Literal["sigmoid", "robust", "ipo"] = "sigmoid"
    """`sigmoid` is DPO, `robust` its unbiased form for wrong labels, `ipo` the squared loss of mean log-ratios."""
    beta: float = Field(0.1, gt=0)
    """Pull towards the reference; tau of IPO."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the labels that are taken to be wrong; with `sigmoid` this is conservative DPO."""
    reference: Literal["initial", "none"] = "initial"
    """`initial`: the model that training begins with, asked once about all pairs; `none` leaves it out."""

    @model_validator(mode="after")
    def _check_ipo(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(f"label_smoothing {self.label_smoothing:g} has no effect on loss ipo; expected sigmoid or robust")
        return self
