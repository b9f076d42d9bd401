"""From the name in a config file to an environment: a built-in name, `module:Class` or `path/to/file.py:Class`."""

import difflib
import importlib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

from rayrlhf.config.environment import EnvironmentSection
from rayrlhf.environments.protocol import Environment
from rayrlhf.errors import UserError
from rayrlhf.rewards.registry import import_file

BUILT_IN = {
    "calculator": "rayrlhf.environments.calculator:Calculator",
    "guessing": "rayrlhf.environments.guessing:Guessing",
}
"""Name -> where the class is."""


def environment_maker(section: EnvironmentSection) -> Callable[[], Environment]:
    """Return what makes a fresh environment for a sample.

    Raises:
        UserError: nothing has that name, it lacks a coroutine `reset` or `step`, or the arguments do not fit it.
    """
    place, colon, attribute = BUILT_IN.get(section.name, section.name).rpartition(":")
    if not colon:
        raise UserError(
            f"environment.name {section.name!r} is not built in{_nearest(section.name, list(BUILT_IN))}; "
            f"built in are {', '.join(BUILT_IN)}, or give module:Class or path/to/file.py:Class"
        )
    if place.endswith(".py") and not Path(place).is_file():
        raise UserError(f"environment.name {section.name!r}: no such file (working directory {Path.cwd()})")
    try:
        module = import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ImportError as error:
        raise UserError(f"environment.name {section.name!r}: {place} cannot be imported: {error}") from error
    kind = getattr(module, attribute, None)
    if not inspect.isclass(kind):
        classes = [name for name, value in vars(module).items() if inspect.isclass(value) and not name.startswith("_")]
        raise UserError(f"environment.name {section.name!r}: {place} has no class {attribute!r}{_nearest(attribute, classes)}")
    for method in ("reset", "step"):
        if not inspect.iscoroutinefunction(getattr(kind, method, None)):
            raise UserError(f"environment.name {section.name!r}: {attribute} needs a method 'async def {method}'")
    try:
        inspect.signature(kind).bind(**section.arguments)
    except TypeError as error:
        raise UserError(f"environment.arguments do not fit {section.name!r}: {error}") from error
    return cast(Callable[[], Environment], partial(kind, **section.arguments))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
