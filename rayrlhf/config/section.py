"""Base class of configuration sections: strict, frozen, documented field by field.

A section is a pydantic model; a file holds the sections of one topic. Unknown keys, wrong types and values out of range are
errors, which `rayrlhf.config.loading.load` turns from pydantic's report into one line each.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


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
