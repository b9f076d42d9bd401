"""Old spellings of configuration keys and values, accepted with one line of notice each."""

import sys
from typing import Any

from rayrlhf.config.loading.problems import sections_in
from rayrlhf.config.section import Section

_noticed: set[str] = set()


def with_current_keys(tree: Any, cls: type[Section], prefix: str = "") -> Any:
    """Replace the old spellings in `Section.renamed_keys` and `renamed_values`.

    A section under both names is merged. If both set a key, the old spelling wins, because presets use new ones only.
    """
    if not isinstance(tree, dict):
        return tree
    result = dict(tree)
    for old, new in cls.renamed_keys.items():
        if old in result:
            value = result.pop(old)
            below = result.get(new)
            result[new] = below | value if isinstance(below, dict) and isinstance(value, dict) else value
            _notice(prefix + old, prefix + new)
    for key, values in cls.renamed_values.items():
        value = result.get(key)
        if isinstance(value, str) and value in values:
            result[key] = values[value]
            _notice(f"{prefix}{key}: {value}", f"{prefix}{key}: {values[value]}")
    for attribute, field in cls.model_fields.items():
        key = field.alias or attribute
        for section, in_list in sections_in(field.annotation):
            value = result.get(key)
            if in_list and isinstance(value, list):
                result[key] = [with_current_keys(item, section, f"{prefix}{key}.{i}.") for i, item in enumerate(value)]
            elif not in_list and key in result and section.matches(value):
                result[key] = with_current_keys(value, section, f"{prefix}{key}.")
    return result


def _notice(old: str, new: str) -> None:
    if old not in _noticed:
        _noticed.add(old)
        sys.stderr.write(f"rayrlhf: configuration: {old} is now {new}; the old spelling still works\n")
