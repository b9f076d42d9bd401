"""Reader of the small JSON and YAML files that steer a run: requests, results, configurations.

If a full or failing disk has damaged such a file, the command ends with one line, never with a traceback.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from rayrlhf.errors import UserError


@contextmanager
def reading(path: Path | str, remedy: str) -> Iterator[None]:
    """Convert an error of the block about a file's content to a `UserError`.

    Args:
        path: the file.
        remedy: what to do about a damaged file.

    Raises:
        UserError: names the file, the reason and the remedy.
        FileNotFoundError: unchanged.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except KeyError as error:
        raise UserError(f"{path} is damaged (no {error}): {remedy}") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason if len(reason) <= 100 else reason[:97] + '...'}): {remedy}") from error


def read_note(path: Path, remedy: str = "restore it, or remove it") -> dict[str, Any]:
    """Return the mapping in a JSON or YAML file.

    Args:
        path: the file; `.yaml` is YAML, anything else JSON.
        remedy: what to do about a damaged file.

    Raises:
        UserError: the file is damaged.
        FileNotFoundError: there is none.
    """
    with reading(path, remedy):
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"expected a mapping, found {type(found).__name__}")
        return found
