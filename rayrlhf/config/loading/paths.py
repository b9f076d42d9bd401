"""Expansion of `~` and environment variables at the start of paths."""

import os
import re
from pathlib import Path
from typing import Any

from rayrlhf.errors import UserError

_BEGIN = re.compile(r"(~|\$\w+|\$\{\w+\})(/|$)")


def expand_paths(tree: Any, file: str) -> Any:
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
    if not isinstance(tree, str) or not _BEGIN.match(tree):
        return tree
    if tree.startswith("~"):
        return str(Path(tree).expanduser())
    expanded = os.path.expandvars(tree)
    if expanded.startswith("$"):
        raise UserError(f"{file}: {tree!r}: the environment variable {tree.partition('/')[0]} is not set")
    return expanded
