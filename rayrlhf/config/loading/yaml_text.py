"""YAML with the scalars of YAML 1.2 and without duplicate keys.

PyYAML reads YAML 1.1, where `on` is true, `1e-6` is text, `010` is eight and `12:30` is 750. Here only `true` and `false` are
booleans, numbers are decimal, and all else is text. `parse` and readers of either YAML version read the output of `dump`
unchanged.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_RESOLVERS = (
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("int", _INTEGER, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("merge", re.compile(r"<<"), "<"),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own way

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML version would not read as text."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Line breaks of YAML 1.1 that are not a newline: between single quotes they would be folded to a space.
        return self.represent_scalar("tag:yaml.org,2002:str", data, '"' if re.search("[\x85\u2028\u2029]", data) else None)


_Dumper.add_representer(str, _Dumper.represent_str)


for _kind, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern.pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(re.sub(r"\.(?=[iInN])", "", node.value)))


def parse(text: str) -> Any:
    """Return the value of a YAML text.

    Values are mappings with distinct keys, lists, text, numbers, booleans and None.

    Raises:
        yaml.YAMLError: the text is not YAML, or gives a key twice.
    """
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def dump(value: object) -> str:
    """Return the YAML of mappings, lists and scalars, keys in their own order."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=100))


def problem_of(error: yaml.YAMLError) -> str:
    """Return a parser's error as one line, with line and column if known."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    context = getattr(error, "context", None)
    where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return " ".join(f"{f'{context}: ' if context else ''}{problem}{where}".split())
