"""Configurations of SFT, reward models and DPO, and checks across their sections."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.data import (
    DistillationDataSection,
    PreferenceDataSection,
    RewardDataSection,
    SupervisedDataSection,
    TuningDataSection,
)
from rayrlhf.config.model import ModelSection
from rayrlhf.config.rank_groups import check_groups, group_label, group_size
from rayrlhf.config.section import Count, RunFolderSection, RunName, Section
from rayrlhf.config.train import (
    DirectPreferenceTrainSection,
    DistillationTrainSection,
    RewardTrainSection,
    SupervisedTrainSection,
    TuningTrainSection,
)


class TuningRunSection(RunFolderSection):
    """Name, folder and seed of a run.

    Its folder is `root/name`; the same name and configuration resume it.
    """

    name: RunName = "sft"
    resume: Literal["auto", "never"] = "auto"
    """`auto` resumes from the newest checkpoint of the run folder; `never` refuses a folder with a run."""


class RewardRunSection(TuningRunSection):
    """Name, folder and seed of a reward model's run."""

    name: RunName = "reward"


class DirectPreferenceRunSection(TuningRunSection):
    """Name, folder and seed of a DPO run."""

    name: RunName = "dpo"


class TuningEvaluationSection(Section):
    """Evaluation on held-out rows before, during and after training."""

    every: int = Field(0, ge=0)
    """Optimizer steps between evaluations. 0 evaluates before and after training only."""
    rows: int | None = Field(None, ge=1)
    """Maximum number of held-out samples or pairs; the first ones are used. Default: all."""


class SupervisedEvaluationSection(TuningEvaluationSection):
    """Loss on held-out samples, and sampled responses."""

    generations: int = Field(4, ge=0)
    """Number of held-out prompts to respond to at each evaluation."""
    max_new_tokens: int = Field(128, ge=1)
    """Maximum tokens of a sampled response."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 is greedy."""


class TuningCheckpointSection(Section):
    """Checkpoints: durable state for resuming."""

    every: int = Field(50, ge=0)
    """Optimizer steps between checkpoints. 0 writes one at the end only."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""
    best_metric: Literal["loss", "accuracy"] | None = None
    """Held-out metric whose best checkpoint is kept and exported. Default: the last checkpoint is exported."""


class SupervisedCheckpointSection(TuningCheckpointSection):
    """Checkpoints of SFT, which has a held-out loss and no accuracy."""

    best_metric: Literal["loss"] | None = None
    """Held-out metric whose best checkpoint is kept and exported. Default: the last checkpoint is exported."""


class WorkersSection(Section):
    """Training processes, and the resources that each requests from Ray."""

    count: Count | tuple[Count, Count] = 1
    """Number of workers, or [minimum, maximum] to use as many as the cluster has."""
    sequence_parallel: int = Field(1, ge=1)
    """Number of consecutive workers that split each row of tokens, so that each stores 1 / `sequence_parallel` of its
    activations. Must divide `count`; the samples are split over the groups."""
    tensor_parallel: int = Field(1, ge=1)
    """Number of consecutive workers that split the weights of attention and feed-forward layers, so that each stores and
    computes 1 / `tensor_parallel` of them. Must divide `count` and the model's heads; not with `sequence_parallel`."""
    expert_parallel: int = Field(1, ge=1)
    """Number of consecutive workers that divide the experts of each layer among them, so that each stores 1 /
    `expert_parallel` of them. The samples are split over all workers, and tokens are sent to their experts. Must divide
    `count` and the model's experts; not with `sequence_parallel` or `tensor_parallel`."""
    cpus: float | None = Field(None, gt=0)
    """CPUs per worker. Default: an equal share of the machine."""
    gpus: float | None = Field(None, ge=0)
    """GPUs per worker. Default: 1 if the cluster has GPUs."""
    threads: int | None = Field(None, ge=1)
    """OpenMP threads per worker. Default: its CPUs."""
    max_failures: int = Field(3, ge=0)
    """Maximum number of lost workers, nodes or groups to recover from before the run fails."""
    address: str | None = None
    """Ray address. Default: the cluster of the job, or a new local one."""

    @property
    def fewest(self) -> int:
        """Minimum number of workers."""
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def most(self) -> int:
        """Maximum number of workers."""
        return self.count if isinstance(self.count, int) else self.count[1]

    @model_validator(mode="after")
    def _check_worker_range(self) -> Self:
        if self.fewest > self.most:
            raise ValueError(f"count: expected [fewest, most], found [{self.fewest}, {self.most}]")
        check_groups(self, self.fewest, self.most, "count")
        return self


class TuningObserveSection(Section):
    """Outputs of a run: event files and live view."""

    tensorboard: bool = True
    """Write event files to `tensorboard/`."""
    live: bool = True
    """Show the live view on a terminal; without one, plain lines are printed."""


class TuningRootConfig(Section):
    """Sections and checks that SFT, reward models and DPO share."""

    run: TuningRunSection
    model: ModelSection
    data: TuningDataSection
    train: TuningTrainSection = TuningTrainSection()
    evaluation: TuningEvaluationSection = TuningEvaluationSection()
    checkpoint: TuningCheckpointSection = TuningCheckpointSection()
    workers: WorkersSection = WorkersSection()
    observe: TuningObserveSection = TuningObserveSection()

    @property
    def sequences(self) -> int:
        """Token sequences per sample: 2 for a preference pair."""
        return 1

    @property
    def has_evaluation(self) -> bool:
        """True with held-out samples or pairs; the default share may still round to none."""
        return self.data.evaluation is not None or self.data.held_out_share > 0

    @model_validator(mode="after")
    def _check_evaluation(self) -> Self:
        """Refuse settings that need held-out rows if there are none."""
        given = {"evaluation.every": self.evaluation.every, "checkpoint.best_metric": self.checkpoint.best_metric}
        for key, value in given.items():
            if value and not self.has_evaluation:
                raise ValueError(f"{key} {value} needs held-out rows: set data.evaluation or data.evaluation_share")
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        """Refuse an optimizer step smaller than one sample per worker or the longest sample."""
        train, workers, longest = self.train, self.workers, self.data.max_length
        train.check_shared_weights("workers", workers)
        if train.samples_per_step is not None and train.samples_per_step < workers.most // group_size(workers):
            raise ValueError(
                f"train.batch_size {train.samples_per_step} is smaller than workers.count {workers.most}{group_label(workers)}"
            )
        both = " for chosen and rejected" if self.sequences == 2 else ""
        limits = {"batch_tokens": train.batch_tokens, "micro_batch_tokens": train.micro_batch_tokens if train.packing else None}
        for key, tokens in limits.items():
            if tokens is not None and tokens < self.sequences * longest:
                raise ValueError(f"train.{key} {tokens} cannot hold data.max_length {longest}{both}")
        return self


class SFTConfig(TuningRootConfig):
    """Configuration of `rayrlhf sft`."""

    run: TuningRunSection = TuningRunSection()
    data: SupervisedDataSection
    train: SupervisedTrainSection = SupervisedTrainSection()
    evaluation: SupervisedEvaluationSection = SupervisedEvaluationSection()
    checkpoint: SupervisedCheckpointSection = SupervisedCheckpointSection()


class DistillationConfig(SFTConfig):
    """Training part of `rayrlhf icl distill`, after its data is built."""

    data: DistillationDataSection
    train: DistillationTrainSection = DistillationTrainSection()


class RewardTrainingConfig(TuningRootConfig):
    """Configuration of `rayrlhf reward`."""

    kind: Literal["outcome", "process"] = "outcome"
    """`outcome` scores whole responses and learns from preference pairs. `process` scores steps and learns from a label per
    step (rows `prompt`, `completions`, `labels`)."""
    run: RewardRunSection = RewardRunSection()
    data: RewardDataSection
    train: RewardTrainSection = RewardTrainSection()
    export_anyway: bool = False
    """Export the model even if its held-out accuracy is not better than chance."""

    @property
    def sequences(self) -> int:
        """Token sequences per sample: 2 for a preference pair."""
        return 2 if self.kind == "outcome" else 1

    @model_validator(mode="after")
    def _check_reward_kind(self) -> Self:
        self.model.check_scalar()
        if self.kind == "process" and self.train.center_coefficient:
            raise ValueError("train.center_coefficient centers the rewards of pairs and has no effect on kind process")
        if self.kind == "outcome" and self.data.step_separator != "\n":
            raise ValueError("data.step_separator has no effect on kind outcome; expected kind process")
        return self


class DPOConfig(TuningRootConfig):
    """Configuration of `rayrlhf dpo`."""

    run: DirectPreferenceRunSection = DirectPreferenceRunSection()
    data: PreferenceDataSection
    train: DirectPreferenceTrainSection = DirectPreferenceTrainSection()

    @property
    def sequences(self) -> int:
        """Token sequences per sample: 2 for a preference pair."""
        return 2

    @model_validator(mode="after")
    def _check_overlong(self) -> Self:
        if self.data.overlong == "truncate":
            raise ValueError(
                "data.overlong truncate keeps the end of a pair, where DPO needs its prompt: expected error or drop"
            )
        return self


TuningConfig = SFTConfig | RewardTrainingConfig | DPOConfig
"""Configurations that the tuning loop runs."""
