"""Root of a chain's configuration file: stages that use each other's outputs."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section

StageKind = Literal["sft", "reward", "dpo", "ppo", "evaluate", "icl-build", "icl-pack", "icl-distill", "icl-evaluate"]


class ChainRunSection(Section):
    """Name and folder of a chain.

    The folder is `root/name`, with one run folder per stage.
    """

    name: str = Field("chain", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    root: Path = Path("runs")

    @property
    def folder(self) -> Path:
        """Folder of the chain."""
        return self.root / self.name


class StageSection(Section):
    """One stage: a command with a configuration file, settings, or both.

    Settings replace those of the file.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Name of the stage's run folder; later stages refer to it by this name."""
    kind: StageKind
    """Command of the stage."""
    config: Path | None = None
    """Configuration file, relative to the folder of the chain's file."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Sections and keys of the command. `${STAGE.OUTPUT}` in a text is an output of an earlier stage, such as
    `${sft.export}`."""


class ChainConfig(Section):
    """Configuration of `rayrlhf run`."""

    run: ChainRunSection = ChainRunSection()
    stages: list[StageSection] = Field(min_length=1)
    """Stages in the order of their runs."""
    address: str | None = None
    """Ray address of all stages. Default: the cluster of the job, or a new local one."""

    @model_validator(mode="after")
    def _check_stage_names(self) -> Self:
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"stages: duplicate name {name!r}")
        return self
