"""From the name in a config file to an environment or an agent: a built-in name, `module:NAME` or `path/to/file.py:NAME`.

A class is an environment, a function an agent.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from rayrlhf.config.rollout import EnvironmentSection
from rayrlhf.environments.agent import Agent
from rayrlhf.environments.protocol import Environment
from rayrlhf.errors import UserError
from rayrlhf.rewards.registry import import_file

BUILT_IN = {
    "calculator": "rayrlhf.environments.calculator:Calculator",
    "guessing": "rayrlhf.environments.guessing:Guessing",
    "program": "rayrlhf.environments.agent:program",
}
"""Name -> where the class or function is."""


def environment_maker(section: EnvironmentSection) -> Callable[[], Environment]:
    """Return what makes a fresh environment for a sample.

    Raises:
        UserError: nothing has that name, it lacks a coroutine `reset` or `step`, or the arguments do not fit it.
    """
    kind = _named(section)
    if not inspect.isclass(kind):
        raise UserError(f"environment.name {section.name!r} is an agent, expected a class here")
    for method in ("reset", "step"):
        if not inspect.iscoroutinefunction(getattr(kind, method, None)):
            raise UserError(f"environment.name {section.name!r}: {kind.__name__} needs a method 'async def {method}'")
    _check_arguments(section, kind)
    return cast(Callable[[], Environment], partial(kind, **section.arguments))


def find_agent(section: EnvironmentSection) -> Agent | None:
    """Return the agent that a section names, its arguments bound; None where it names an environment.

    Raises:
        UserError: nothing has that name, or the arguments do not fit it.
    """
    found = _named(section)
    if inspect.isclass(found):
        return None
    _check_arguments(section, found, None, None)
    return partial(found, **section.arguments)


def check_environment(section: EnvironmentSection) -> None:
    """Check that a section names an environment or an agent; raises as those do."""
    if find_agent(section) is None:
        environment_maker(section)


def _named(section: EnvironmentSection) -> Any:
    """The class of an environment, or an agent's function."""
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
    found = getattr(module, attribute, None)
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        known = [name for name, value in vars(module).items() if inspect.isclass(value) or inspect.isfunction(value)]
        near = _nearest(attribute, [name for name in known if not name.startswith("_")])
        raise UserError(f"environment.name {section.name!r}: {place} has no class or function {attribute!r}{near}")
    return found


def _check_arguments(section: EnvironmentSection, called: Callable[..., Any], *given: None) -> None:
    try:
        inspect.signature(called).bind(*given, **section.arguments)
    except TypeError as error:
        raise UserError(f"environment.arguments do not fit {section.name!r}: {error}") from error


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
