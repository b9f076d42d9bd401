"""Base classes of configuration sections: strict, frozen, documented field by field.

A section is a pydantic model; a file holds the sections of one topic. Unknown keys, wrong types and values out of range are
errors, which `rayrlhf.config.loading.load` turns from pydantic's report into one line each.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

GIB = 2**30
"""Bytes of a gibibyte."""
_JOB_FOLDERS = "working_dir_files"
"""Ray's folder of unpacked working directories."""
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its folder.")]
Count = Annotated[int, Field(ge=1)]


def lasting(path: Path) -> Path:
    """Return a path of results that outlives a Ray job.

    Ray unpacks the directory of `ray job submit --working-dir` into its package cache, and deletes it after the job.
    """
    if path.is_absolute() or not in_job_folder():
        return path
    return Path(os.environ.get("RAYRLHF_JOB_RUNS") or "~/rayrlhf-jobs").expanduser().absolute() / path


def in_job_folder() -> bool:
    """Return True if the working directory is Ray's copy of that of a job."""
    return _JOB_FOLDERS in Path.cwd().parts


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
    def matches(cls, value: object) -> bool:
        """Return True where settings belong to this section, not to another of its union."""
        return True


class FolderSection(Section):
    """Name and folder of a run. Its folder is `root/name`."""

    name: RunName
    root: Path = Path("runs")
    """Parent folder of run folders. Ray deletes the working directory of a job, so there a relative path is placed in the
    folder `RAYRLHF_JOB_RUNS`, by default `~/rayrlhf-jobs` on the driver's node."""

    @property
    def folder(self) -> Path:
        """Run folder."""
        return lasting(self.root) / self.name


class RunFolderSection(FolderSection):
    """Name, folder and seed of a run. Its folder is `root/name`."""

    seed: int = Field(0, ge=0)
    """Seed of everything random in the run."""
