"""Convert pydantic's report to lines: key, expectation, value, nearest valid key."""

import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from rayrlhf.config.section import Section

_EXPECTED: dict[str, str] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "model_type": "a section with keys and values",
}
_EXPECTED_WITH_BOUND: dict[str, str] = {
    "greater_than": "> {gt:g}",
    "greater_than_equal": ">= {ge:g}",
    "less_than": "< {lt:g}",
    "less_than_equal": "<= {le:g}",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "text that matches {pattern}",
    "too_long": "at most {max_length} items",
    "too_short": "at least {min_length} items",
}


def problems(error: ValidationError, tree: dict[str, Any], root: type[Section]) -> dict[str, str]:
    """Return one message per wrong key, in the order of the file.

    Args:
        error: of validating `tree` as `root`.
        root: the section that the tree should be.

    Returns:
        Messages by dotted key; "" is the file as a whole.
    """
    found: dict[str, list[Any]] = {}
    for detail in error.errors():
        found.setdefault(_dotted(detail, tree), []).append(detail)
    return {dotted: _message(dotted, details, root, tree) for dotted, details in found.items()}


def known_keys(root: type[Section], prefix: str = "", tree: object = None) -> Iterator[str]:
    """Yield every dotted key of a section tree, sections before their keys.

    Items of a list have the key `0`.

    Where a key has several sections to choose from, `tree` selects the one that its settings belong to; without it all are
    yielded.
    """
    for attribute, field in root.model_fields.items():
        name = field.alias or attribute
        yield prefix + name
        value = tree.get(name) if isinstance(tree, dict) else None
        for section, in_list in sections_in(field.annotation):
            if value is None or in_list or section.matches(value):
                yield from known_keys(section, f"{prefix}{name}.{'0.' if in_list else ''}", None if in_list else value)


def _message(dotted: str, details: list[Any], root: type[Section], tree: object) -> str:
    first = details[0]
    if first["type"] == "extra_forbidden":
        return f"unknown key; {_nearest_key(dotted, root, tree)}"
    if first["type"] == "missing":
        return "required, but not given"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    expected = list(dict.fromkeys(_expected(detail) for detail in details))
    if None in expected:
        return "; ".join(dict.fromkeys(detail["msg"] for detail in details))
    value = first["input"]
    choices = re.findall(r"'([^']*)'", " ".join(map(str, expected)))
    near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"expected {' or '.join(map(str, expected))}, found {_short(value)}{hint}"


def _expected(detail: Any) -> str | None:
    kind = detail["type"]
    if kind in _EXPECTED_WITH_BOUND:
        return _EXPECTED_WITH_BOUND[kind].format(**detail["ctx"])
    return _EXPECTED.get(kind)


def _dotted(detail: Any, tree: Any) -> str:
    """Return the dotted key of an error, without pydantic's tags of union members."""
    here: Any = tree
    parts: list[str] = []
    location = detail["loc"]
    for depth, part in enumerate(location):
        inside = part in here if isinstance(here, dict) else isinstance(here, list) and part in range(len(here))
        if inside:
            here = here[part]
        elif not (detail["type"] == "missing" and depth == len(location) - 1):
            continue
        parts.append(str(part))
    return ".".join(parts)


def _nearest_key(dotted: str, root: type[Section], tree: object) -> str:
    """Return the hint for an unknown key.

    In this order: the same name elsewhere, a similar or longer name in the section, a similar name elsewhere, the valid keys.
    """
    generic = re.sub(r"\.\d+(?=\.|$)", ".0", dotted)
    section, _, leaf = generic.rpartition(".")
    keys = list(known_keys(root, tree=tree))
    siblings = [key for key in keys if key.rpartition(".")[0] == section]
    searches: tuple[Callable[[], list[str]], ...] = (
        lambda: difflib.get_close_matches(generic, [key for key in keys if key.rpartition(".")[2] == leaf], n=1, cutoff=0),
        lambda: _similar_leaf(leaf, siblings),
        lambda: [key for key in siblings if len(leaf) > 3 and key.rpartition(".")[2].startswith(f"{leaf.rstrip('s')}_")],
        lambda: _similar_leaf(leaf, keys),
    )
    for search in searches:
        if match := search():
            return f"did you mean {match[0]}?"
    return f"expected one of {', '.join(key.rpartition('.')[2] for key in siblings)}"


def _similar_leaf(leaf: str, keys: list[str]) -> list[str]:
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(keys)}
    near = difflib.get_close_matches(leaf, by_leaf, n=3, cutoff=0.7)
    # Of equally near names (rollout_cpus and rollout_gpus for rollout_pcus) take the one with the same letters.
    near.sort(key=lambda match: sorted(match) != sorted(leaf))
    return [by_leaf[match] for match in near[:1]]


def sections_in(annotation: object, in_list: bool = False) -> Iterator[tuple[type[Section], bool]]:
    """Yield the section classes of a field annotation, with True for items of a list."""
    origin = typing.get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, in_list
    elif origin is typing.Annotated:
        yield from sections_in(typing.get_args(annotation)[0], in_list)
    elif isinstance(annotation, types.UnionType) or origin in (typing.Union, list):
        for argument in typing.get_args(annotation):
            yield from sections_in(argument, in_list or origin is list)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
