"""Load a configuration from its layers: preset < YAML file < command line.

The layers are merged as plain trees and validated once, strictly (no text in place of a number), so an error always names the
key and its source, the file or the command line. Every mistake is one line of a `UserError`.
"""

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from rayrlhf.config.loading.kinds import check_kind
from rayrlhf.config.loading.presets import preset_tree, preset_under
from rayrlhf.config.loading.problems import problems, sections_in
from rayrlhf.config.loading.yaml_text import dump, parse, problem_of
from rayrlhf.config.section import Section
from rayrlhf.errors import UserError

T = TypeVar("T", bound=Section)
_COMMAND_LINE = "command line"
_MAX_LINES = 5
_ABSENT = "(absent)"
_EXPANDED = re.compile(r"(~|\$\w+|\$\{\w+\})(/|$)")
_noticed: set[str] = set()


def load_config(cls: type[T], path: Path | str | None, overrides: Sequence[str] = (), *, without: Sequence[str] = ()) -> T:
    """Read, merge and validate a configuration.

    Args:
        cls: the root section, for example `PPOConfig`.
        path: a YAML file; None for overrides only. Relative paths in it stay as they are written.
        overrides: `section.key=value` each, the value in YAML; `section.list.0.key=value` sets an item of a list. A top-level
            `preset: NAME` (see `PRESETS`) in file or overrides is the lowest layer.
        without: sections of the file to leave out.

    Raises:
        UserError: no such file, not YAML, a key given twice, an unknown key, a missing or wrong value. At most five lines, each
            with file, dotted key and what was expected.
    """
    path = Path(path) if path is not None else None
    tree = _read(path) if path is not None else {}
    tree = {section: value for section, value in tree.items() if section not in without}
    given = [apply_override(tree, override) for override in overrides]
    return _validated(cls, tree, given, str(path) if path is not None else _COMMAND_LINE, _COMMAND_LINE)


def load_tree(cls: type[T], settings: dict[str, Any], path: Path | None, place: str) -> T:
    """Validate settings from another file, such as a chain's.

    They replace those of a configuration file, if one is given.

    Args:
        cls: the root section.
        settings: a tree of sections and keys.
        path: a YAML file with lower priority; None for the settings only.
        place: name of the settings in messages.

    Raises:
        UserError: as `load_config`.
    """
    tree = _merged(_read(path), settings) if path is not None else dict(settings)
    return _validated(cls, tree, list(_flat(settings)), str(path) if path is not None else place, place)


def _validated(cls: type[T], tree: dict[str, Any], given: Sequence[str], file: str, over: str) -> T:
    """Validate a merged tree; the keys `given` are from `over`, others from `file`."""
    name = tree.pop("preset", None)
    if name is not None:
        settings = with_current_keys(tree, cls)
        preset = preset_tree(name, f"{over if 'preset' in given else file}: preset")
        tree = _merged(preset_under(preset, settings), settings)
    tree = expand_paths(with_current_keys(tree, cls), file)
    try:
        return cls.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        check_kind(cls, tree, file)
        lines = [
            f"{_source(dotted, given, file, over)}: {dotted and dotted + ': '}{message}"
            for dotted, message in problems(error, tree, cls).items()
        ]
        if len(lines) > _MAX_LINES:
            lines[_MAX_LINES - 1 :] = [f"{file}: and {len(lines) - _MAX_LINES + 1} more"]
        raise UserError("\n".join(lines)) from error


def stored_config(cls: type[T], text: str) -> T:
    """Return the configuration stored in a run folder, possibly by an older version."""
    return cls.model_validate(with_current_keys(yaml.safe_load(text), cls))


def dump_config(config: Section) -> str:
    """Return a configuration as YAML with all values; loading it gives the same configuration."""
    return dump(config.model_dump(mode="json"))


def differences(old: Section, new: Section) -> list[str]:
    """Return the differences of two configurations as `dotted.key: old -> new`."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key, _ABSENT)} -> {after.get(key, _ABSENT)}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def stored_differences(
    cls: type[Section], stored: str, wanted: str, *, may_change: Callable[[str], bool] = lambda key: False
) -> list[str]:
    """Compare the configuration text of a run folder with a new one; see `differences`.

    Args:
        cls: the root section of both.
        stored: the configuration in the run folder.
        wanted: the new configuration.
        may_change: returns True for a dotted key whose differences are ignored.
    """
    old, new = (stored_config(cls, text) for text in (stored, wanted))
    return [line for line in differences(old, new) if not may_change(line.partition(":")[0])]


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        folder = path.parent.iterdir() if path.parent.is_dir() else ()
        near = difflib.get_close_matches(path.name, [entry.name for entry in folder], n=1)
        raise UserError(f"{path}: no such file{f'; did you mean {path.with_name(near[0])}?' if near else ''}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {problem_of(error)}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections with keys and values, found {type(tree).__name__}")
    return tree


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge two trees: sections key by key; other values of `over` replace those of `under`."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _source(dotted: str, given: Sequence[str], file: str, over: str) -> str:
    """Return the source of a key.

    It is `over` if that set the key, its section, or a key in it.
    """
    for key in given:
        if dotted and (f"{dotted}.".startswith(f"{key}.") or f"{key}.".startswith(f"{dotted}.")):
            return over
    return file


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    """Return the leaves of a tree as text by dotted key.

    A list of plain values and an empty value are leaves.
    """
    items: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(str(index), item) for index, item in enumerate(value)]
    leaves: dict[str, str] = {}
    for key, item in items:
        leaves |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return leaves or {prefix: json.dumps(value, ensure_ascii=False)}


def apply_override(tree: dict[str, Any], override: str) -> str:
    """Set one value in a configuration tree, in place, creating missing sections.

    Args:
        tree: nested mappings and lists.
        override: dotted key, `=`, and a YAML value; a number in the key is an index into a list, and its length appends.

    Returns:
        The dotted key.

    Raises:
        UserError: not of that form, the value is not YAML, or the key leads through a value without keys.
    """
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted or not all(dotted.split(".")):
        raise UserError(f"command line: {override}: expected section.key=value")
    try:
        value = parse(text)
    except yaml.YAMLError as error:
        raise UserError(f"command line: {dotted}: the value is not YAML: {problem_of(error)}") from error
    _put(tree, dotted.split("."), value, dotted)
    return dotted


def _put(tree: dict[str, Any], parts: list[str], value: object, dotted: str) -> None:
    here: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        # A following number means that the new value here is a list.
        made: Any = value if last else [] if parts[depth + 1].isdecimal() else {}
        if isinstance(here, list):
            here = _put_item(here, part, made, last, dotted)
        elif isinstance(here, dict):
            if last or here.get(part) is None:
                here[part] = made
            here = here[part]
        else:
            raise UserError(f"command line: {dotted}: {'.'.join(parts[:depth])} is a value, expected a section or a list")


def _put_item(items: list[Any], part: str, made: Any, last: bool, dotted: str) -> Any:
    if not part.isdecimal() or int(part) > len(items):
        raise UserError(f"command line: {dotted}: {part} is no index in a list of {len(items)}, expected 0 to {len(items)}")
    index = int(part)
    if index == len(items):
        items.append(made)
    elif last:
        items[index] = made
    return items[index]


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


def expand_paths(tree: object, file: str) -> Any:
    """Replace `~/...` and `$NAME/...` in all values of a tree.

    Args:
        tree: sections, lists and values.
        file: name of the source in messages.

    Raises:
        UserError: a variable is not set.
    """
    if isinstance(tree, dict):
        return {key: expand_paths(value, file) for key, value in tree.items()}
    if isinstance(tree, list):
        return [expand_paths(value, file) for value in tree]
    if not isinstance(tree, str) or not _EXPANDED.match(tree):
        return tree
    if tree.startswith("~"):
        return str(Path(tree).expanduser())
    expanded = os.path.expandvars(tree)
    if expanded.startswith("$"):
        raise UserError(f"{file}: {tree!r}: the environment variable {tree.partition('/')[0]} is not set")
    return expanded
