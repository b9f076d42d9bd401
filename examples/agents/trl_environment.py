"""Agent that plays environments and tools written for TRL's `GRPOTrainer`.

An environment (`environment_factory`) has `reset`, public methods that are the policy's tools, and perhaps `get_reward`.
`tools` are plain functions. The texts that the policy reads are those of TRL:

    environment:
      name: examples/agents/trl_environment.py:play
      arguments: {make: "my_games.py:Game", tools: ["my_tools.py:search"]}
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers.utils import get_json_schema

from rayrlhf.data.records import Prompt
from rayrlhf.environments.agent import Endpoint
from rayrlhf.environments.tool_use.tool import Tool
from rayrlhf.environments.tool_use.tool_agent import converse, opening
from rayrlhf.errors import UserError
from rayrlhf.plugins import Registry, bind_arguments

MAKERS: Registry[Callable[..., Any]] = Registry("environment.arguments.make", {})
FUNCTIONS: Registry[Callable[..., Any]] = Registry("environment.arguments.tools", {})
OWN = ("reset", "get_reward")


async def play(
    prompt: Prompt,
    endpoint: Endpoint,
    make: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    tools: Sequence[str] = (),
) -> float:
    """Play a sample.

    As in TRL, `reset` gets the columns of the dataset's row, its text is added to the last message, and an exception of a tool
    is its answer.

    Args:
        make: class of the environment, or function that returns it; None for tools alone.
        arguments: its keyword arguments.
        tools: functions with type hints and a docstring in Google's style.

    Returns:
        The environment's own reward; 0.0 without one, for runs whose reward functions judge the response.

    Raises:
        UserError: there is neither an environment nor a tool, or one cannot be found.
    """
    functions, messages, game = [FUNCTIONS.resolve(tool) for tool in tools], opening(prompt), None
    if make is not None:
        game = bind_arguments(f"environment.arguments.make {make!r}", MAKERS.resolve(make), arguments or {})()
        said = await _run(game.reset, **{**prompt.columns, "prompt": messages})
        if said is not None:
            messages[-1] = messages[-1] | {"content": messages[-1]["content"] + said}
        names = [name for name, _ in inspect.getmembers(type(game), inspect.isfunction) if name[0] != "_" and name not in OWN]
        functions += [getattr(game, name) for name in names]
    if not functions:
        raise UserError("environment.arguments: expected make or tools, found neither")
    await converse(endpoint, messages, {function.__name__: _tool(function) for function in functions})
    return float(await _run(game.get_reward)) if hasattr(game, "get_reward") else 0.0


def _tool(function: Callable[..., Any]) -> Tool:
    """Return a function as a tool; its docstring describes it, its arguments and its result."""
    schema = get_json_schema(function)["function"]
    own = [schema.pop(key) for key in ("name", "description", "parameters")]
    return Tool(*own, partial(_call, function), schema)


async def _call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    try:
        return str(await _run(function, **arguments))
    except Exception as error:  # noqa: BLE001 - the boundary to user code; the policy reads it
        return str({"error": str(error)})


async def _run(function: Callable[..., Any], **arguments: Any) -> Any:
    result = await asyncio.to_thread(function, **arguments)
    return await result if inspect.isawaitable(result) else result
