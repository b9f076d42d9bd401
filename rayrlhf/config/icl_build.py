"""The root of an in-context dataset's configuration file: which examples are shown beside which, and what is learnt of them."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.demonstrations import SelectionSection
from rayrlhf.config.model import ModelSection
from rayrlhf.config.presft import PairsSection
from rayrlhf.config.section import Section


class BuildRunSection(Section):
    """Identity of a build. Its folder is `root/name`."""

    name: str = Field("in-context", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    root: Path = Path("runs")
    """Folder that run folders lie in."""
    seed: int = Field(0, ge=0)
    """Everything random follows from it."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / self.name


class ExamplesSection(PairsSection):
    """The examples, each a target and a demonstration of others: JSONL, Parquet, a built-in, or a hub name."""

    task_field: str | None = None
    """A column whose value is equal for rows of one task; an example is shown only beside those of its own. One task when not
    given."""


class DemonstrationsSection(SelectionSection):
    """Which examples are shown beside a target, and how many."""

    least: int = Field(0, ge=0)
    """Fewest; how many a target gets is drawn evenly from `least` to `most`, so that 0 keeps some samples without any."""
    most: int = Field(8, ge=1)
    """Most."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.least > self.most:
            raise ValueError(f"least {self.least} is more than most {self.most}")
        return self


class SampleSection(Section):
    """How target and demonstrations are written down, and what is learnt."""

    layout: Literal["turns", "system", "text"] = "turns"
    """A user and an assistant turn each, all in the system turn, or plain text for models without a chat template."""
    loss_on: Literal["target", "every"] = "target"
    """The target's answer, or every answer, which needs `turns`."""
    question: str = "{prompt}\n"
    """How `system` and `text` write a question; it ends where the answer begins."""
    separator: str = "\n\n"
    """What `system` and `text` put between examples."""
    max_tokens: int = Field(1024, ge=2)
    """Most tokens of a sample with its answer; where more were drawn, the farthest demonstrations go first."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.loss_on == "every" and self.layout != "turns":
            raise ValueError(f"loss_on every needs layout turns, found {self.layout}, which marks no answers apart")
        if "{prompt}" not in self.question:
            raise ValueError("question has no {prompt} in it, where the prompt goes")
        return self


class BuildPipelineSection(Section):
    """Processes, and how work is cut."""

    rows_per_part: int = Field(1024, ge=1)
    """Rows of one part file: what a process makes at once, and the most that a crash makes it do again."""
    builders: int | None = Field(None, ge=1)
    """Processes that retrieve and write samples; one a CPU when not given. They share one memory-mapped index."""
    max_restarts: int = Field(5, ge=0)
    """How often a process that died is started again before the run gives up."""
    stall_seconds: float = Field(1800.0, gt=0)
    """Give up when nothing makes progress for so long."""
    address: str | None = None
    """Ray address; a job's own cluster, or a new local one, when not given."""


class ICLBuildConfig(Section):
    """Everything `rayrlhf icl build` needs."""

    run: BuildRunSection = BuildRunSection()
    model: ModelSection
    """Whose tokenizer and chat template count tokens; no weights are loaded."""
    data: ExamplesSection
    demonstrations: DemonstrationsSection = DemonstrationsSection()
    sample: SampleSection = SampleSection()
    pipeline: BuildPipelineSection = BuildPipelineSection()
