"""Overrides `section.key=value` of the command line."""

from typing import Any

import yaml

from rayrlhf.config.loading.yaml_text import parse, problem_of
from rayrlhf.errors import UserError


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
