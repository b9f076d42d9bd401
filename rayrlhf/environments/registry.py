"""Environment registry: resolves `environment.name` to an environment class or an agent function."""

import inspect
from collections.abc import Callable
from typing import Any

from rayrlhf.config.rollout import EnvironmentSection
from rayrlhf.environments.agent import Agent
from rayrlhf.environments.protocol import Environment
from rayrlhf.errors import UserError
from rayrlhf.plugins import Registry, bind_arguments

ENVIRONMENTS: Registry[Any] = Registry(
    "environment.name",
    {
        "calculator": "rayrlhf.environments.calculator:Calculator",
        "gym": "rayrlhf.environments.gym:Gym",
        "guessing": "rayrlhf.environments.guessing:Guessing",
        "mcp": "rayrlhf.environments.tool_use.tool_agent:mcp",
        "program": "rayrlhf.environments.agent:program",
        "tools": "rayrlhf.environments.tool_use.tool_agent:tools",
    },
    "class or function",
    lambda found: inspect.isclass(found) or inspect.isfunction(found),
)
"""A class is an environment, a function an agent."""


def environment_maker(section: EnvironmentSection) -> Callable[[], Environment]:
    """Return a factory that makes an environment for each sample.

    Raises:
        UserError: nothing has that name, it lacks a coroutine `reset` or `step`, or the arguments do not fit it.
    """
    kind = ENVIRONMENTS.resolve(section.name)
    if not inspect.isclass(kind):
        raise UserError(f"environment.name {section.name!r} is an agent, expected a class here")
    for method in ("reset", "step"):
        if not inspect.iscoroutinefunction(getattr(kind, method, None)):
            raise UserError(f"environment.name {section.name!r}: {kind.__name__} needs a method 'async def {method}'")
    return _bound(section, kind, 0)


def find_agent(section: EnvironmentSection) -> Agent | None:
    """Return the agent of a section with bound arguments; None for an environment.

    Raises:
        UserError: nothing has that name, or the arguments do not fit it.
    """
    found = ENVIRONMENTS.resolve(section.name)
    return None if inspect.isclass(found) else _bound(section, found, 2)


def check_environment(section: EnvironmentSection) -> None:
    """Check that a section names an environment or an agent.

    Raises:
        UserError: see `environment_maker` and `find_agent`.
    """
    if find_agent(section) is None:
        environment_maker(section)


def _bound(section: EnvironmentSection, found: Callable[..., Any], positional: int) -> Callable[..., Any]:
    return bind_arguments(f"environment.name {section.name!r}", found, section.arguments, positional)
