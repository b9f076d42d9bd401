"""The run of SFT or a reward model: its folder, evaluation, checkpoints and workers."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section

Count = Annotated[int, Field(ge=1)]


class TuningRunSection(Section):
    """Identity of a run. Its folder is `root/name`; the same name and configuration resume it."""

    name: str = Field("sft", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    root: Path = Path("runs")
    """Folder that run folders lie in."""
    seed: int = Field(0, ge=0)
    """Of the order of samples, of new heads and adapters, and of noise."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest checkpoint of the run folder; `never` refuses a folder that has a run in it."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / self.name


class RewardRunSection(TuningRunSection):
    """Identity of a reward model's run."""

    name: str = Field("reward", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""


class DirectPreferenceRunSection(TuningRunSection):
    """Identity of a DPO run."""

    name: str = Field("dpo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""


class TuningEvaluationSection(Section):
    """Measuring on held-out rows during and after training."""

    every: int = Field(0, ge=0)
    """Optimizer steps between evaluations; 0 evaluates before and after only."""
    rows: int | None = Field(None, ge=1)
    """Use only the first n held-out samples or pairs."""


class SupervisedEvaluationSection(TuningEvaluationSection):
    """The loss on held-out samples, and what the model writes."""

    generations: int = Field(4, ge=0)
    """Prompts of held-out samples to answer at each evaluation."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest sampled answer in tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""


class TuningCheckpointSection(Section):
    """Durable state for resuming."""

    every: int = Field(50, ge=0)
    """Optimizer steps between checkpoints; 0 writes one at the end only."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that stay."""
    best_metric: Literal["loss", "accuracy"] | None = None
    """Also keep, and export, the checkpoint that is best by this held-out metric; the last one when not given."""


class SupervisedCheckpointSection(TuningCheckpointSection):
    """Durable state of SFT, which has a loss on held-out samples and no accuracy."""

    best_metric: Literal["loss"] | None = None
    """Also keep, and export, the checkpoint that is best by the held-out loss; the last one when not given."""


class WorkersSection(Section):
    """Processes that train together, and what each asks Ray for."""

    count: Count | tuple[Count, Count] = 1
    """A number, or [fewest, most] to go on with as many as the cluster has."""
    cpus: float | None = Field(None, gt=0)
    """Per worker; an equal share of the machine when not given."""
    gpus: float | None = Field(None, ge=0)
    """Per worker; one where the cluster has GPUs, when not given."""
    threads: int | None = Field(None, ge=1)
    """OpenMP threads per worker; its CPUs when not given."""
    max_failures: int = Field(3, ge=0)
    """Lost workers, nodes or groups to recover from before the run fails."""
    address: str | None = None
    """Ray address; a job's own cluster, or a new local one, when not given."""

    @property
    def fewest(self) -> int:
        """Workers it can do with."""
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def most(self) -> int:
        """Workers it asks for."""
        return self.count if isinstance(self.count, int) else self.count[1]

    @model_validator(mode="after")
    def _check_worker_range(self) -> Self:
        if self.fewest > self.most:
            raise ValueError(f"count: expected [fewest, most], found [{self.fewest}, {self.most}]")
        return self


class TuningObserveSection(Section):
    """What a run writes and shows."""

    tensorboard: bool = True
    """Write event files to `tensorboard/`."""
    live: bool = True
    """The terminal view; plain lines where there is no terminal."""
