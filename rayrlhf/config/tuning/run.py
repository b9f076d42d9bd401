"""Run of SFT, a reward model or DPO: folder, evaluation, checkpoints, workers."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section

Count = Annotated[int, Field(ge=1)]


class TuningRunSection(Section):
    """Name, folder and seed of a run.

    Its folder is `root/name`; the same name and configuration resume it.
    """

    name: str = Field("sft", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    root: Path = Path("runs")
    """Parent folder of run folders."""
    seed: int = Field(0, ge=0)
    """Seed of the sample order, of new heads and adapters, and of noise."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` resumes from the newest checkpoint of the run folder; `never` refuses a folder with a run."""

    @property
    def folder(self) -> Path:
        """Run folder."""
        return self.root / self.name


class RewardRunSection(TuningRunSection):
    """Name, folder and seed of a reward model's run."""

    name: str = Field("reward", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""


class DirectPreferenceRunSection(TuningRunSection):
    """Name, folder and seed of a DPO run."""

    name: str = Field("dpo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""


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
    """Number of workers, or [minimum, maximum] to train with as many as the cluster has."""
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
        return self


class TuningObserveSection(Section):
    """Outputs of a run: event files and live view."""

    tensorboard: bool = True
    """Write event files to `tensorboard/`."""
    live: bool = True
    """Show the live view on a terminal; without one, plain lines are printed."""
