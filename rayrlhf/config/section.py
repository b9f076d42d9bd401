"""The base of every config section: strict, frozen, documented field by field.

A section is a pydantic model in a file of its own. Unknown keys, wrong types and values out of range are refused;
`rayrlhf.config.loading.load` turns pydantic's report into one line for the user.
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the configuration file. Unknown keys are errors and values cannot change after loading."""

    # Defaults are not validated: pydantic refuses a Path as the default of strict JSON. A test loads them all instead.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, serialize_by_alias=True
    )

    renamed_keys: ClassVar[Mapping[str, str]] = {}
    """Old key -> new key, for files written before a rename."""
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """Key -> old value -> new value."""
