"""Base classes of configuration sections: strict, frozen, documented field by field.

A section is a pydantic model; a file holds the sections of one topic. Unknown keys, wrong types and values out of range are
errors, which `rayrlhf.config.loading.load` turns from pydantic's report into one line each.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

GIB = 2**30
"""Bytes of a gibibyte."""
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its folder.")]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Part of a configuration file. Unknown keys are errors, and values cannot change after loading."""

    # Defaults are not validated: pydantic refuses a Path as the default of strict JSON. A test loads them all instead.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, serialize_by_alias=True
    )

    renamed_keys: ClassVar[Mapping[str, str]] = {}
    """Old key -> new key, for files written before a rename."""
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """Key -> old value -> new value."""

    @classmethod
    def matches(cls, value: Any) -> bool:
        """Return True where settings belong to this section, not to another of its union."""
        return True


class FolderSection(Section):
    """Name and folder of a run. Its folder is `root/name`."""

    name: RunName
    root: Path = Path("runs")
    """Parent folder of run folders."""

    @property
    def folder(self) -> Path:
        """Run folder."""
        return self.root / self.name


class RunFolderSection(FolderSection):
    """Name, folder and seed of a run. Its folder is `root/name`."""

    seed: int = Field(0, ge=0)
    """Seed of everything random in the run."""
