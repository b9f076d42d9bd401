"""The root of a chain's configuration file: stages that feed each other."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section

StageKind = Literal["sft", "reward", "dpo", "ppo", "evaluate", "icl-build", "icl-pack", "icl-distill", "icl-evaluate"]


class ChainRunSection(Section):
    """Identity of a chain. Its folder is `root/name`, with a run folder in it for each stage."""

    name: str = Field("chain", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    root: Path = Path("runs")

    @property
    def folder(self) -> Path:
        """The chain's folder."""
        return self.root / self.name


class StageSection(Section):
    """One stage: a command and its configuration, as a file, as settings, or as settings laid over a file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Its run folder, and what later stages call it."""
    kind: StageKind
    config: Path | None = None
    """A configuration file, relative to the chain's."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Sections and keys of the command. `${STAGE.OUTPUT}` in a text is an output of an earlier stage: `${sft.export}`."""


class ChainConfig(Section):
    """Everything `rayrlhf run` needs."""

    run: ChainRunSection = ChainRunSection()
    stages: list[StageSection] = Field(min_length=1)
    address: str | None = None
    """Ray address for all stages; a job's own cluster, or a new local one, when not given."""

    @model_validator(mode="after")
    def _check_stage_names(self) -> Self:
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"stages: the name {name!r} is given twice")
        return self
