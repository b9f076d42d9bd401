"""Model card of a run: base model, data, figures, versions, configuration; no secrets, no folders."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from rayrlhf.observe.closing import held_out_lines
from rayrlhf.observe.host_facts import FILE_NAME as ENVIRONMENT
from rayrlhf.tools.debug.redact import known_secrets, redacted_tree
from rayrlhf.tools.report.run_files import read_mapping
from rayrlhf.tools.report.run_view import folder_kind

_FOLDERS = re.compile(r"(?:(?<=file://)|(?<![\w/.<~\]]))(?:~[\w.-]*/(?:[^\s/'\"<>]+/)*|/(?:[^\s/'\"<>]+/)+)")
"""Folders of absolute paths and of paths from a home; not those of URLs, nor closing tags (`</think></answer>`)."""


def model_card(run: Path) -> str:
    """Return the text of `README.md` for the model of a run.

    Raises:
        UserError: no run folder.
    """
    kind = folder_kind(run)
    config = without_folders(redacted_tree(read_mapping(run / "config.yaml")[1], known_secrets()))
    _, environment = read_mapping(run / ENVIRONMENT)
    base, versions = str(_at(config, "model", "path") or ""), environment.get("packages", {})
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["rayrlhf", kind.lower().replace(" ", "-")]}
    front |= {"base_model": base} if base.count("/") == 1 and ":" not in base and not Path(base).exists() else {}
    data = [f"- {name}: `{path}`" for name in ("train", "evaluation") if (path := _at(config, "data", name, "path"))]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {run.absolute().name}\n\nA {kind} run of rayrlhf on `{base}`.",
        _section("Data", data),
        _section("Figures", [f"- {line}" for line in held_out_lines(run)]),
        _section("Versions", [f"- {name} {version}" for name, version in versions.items()]),
        f"## Configuration\n\n```yaml\n{yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def without_folders(tree: Any) -> Any:
    """Return settings with absolute paths cut to their last part.

    Paths inside texts and in names are cut too.
    """
    if isinstance(tree, Mapping):
        return {without_folders(key): without_folders(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_folders(value) for value in tree]
    if not isinstance(tree, str):
        return tree
    return PurePath(tree).name if PurePath(tree).is_absolute() and "\n" not in tree else _FOLDERS.sub("", tree)


def model_files(run: Path) -> Iterator[Path]:
    """Yield the files of a run's exported model, except a card of its own."""
    yield from (path for path in sorted((run / "export").rglob("*")) if path.is_file() and path.name != "README.md")


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([f"## {title}", "", *lines]) if lines else ""


def _at(tree: Any, *keys: str) -> Any:
    """Return a nested value, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
