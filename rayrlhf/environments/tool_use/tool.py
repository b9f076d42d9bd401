"""Tools of the built-in agents: calculator, Python sandbox, search."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rayrlhf.config.data import DatasetSection
from rayrlhf.data.dataset_rows import read_rows
from rayrlhf.data.word_index import WordIndex
from rayrlhf.environments.calculator import calculate
from rayrlhf.errors import UserError
from rayrlhf.plugins import Registry, bind_arguments
from rayrlhf.rewards.sandbox import Limits, run_program

TIMED_OUT = "the program ran out of time"
_INDEXING = threading.Lock()
"""Held while an index is built, so that agents that begin together build one."""


class ToolError(Exception):
    """Fault of a call, which the policy reads.

    Any other exception of a tool fails the sample.
    """


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the policy can call.

    Attributes:
        parameters: JSON schema of its arguments.
        call: coroutine from the arguments to the text that the policy reads.
        further: more keys of its schema, for chat templates that write them.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    call: Callable[[Mapping[str, Any]], Awaitable[str]]
    further: Mapping[str, Any] = field(default_factory=dict)

    @property
    def schema(self) -> dict[str, Any]:
        """The tool in OpenAI's form."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function | dict(self.further)}


def calculator() -> Tool:
    """Return a calculator of numbers, + - * / and parentheses."""

    async def call(arguments: Mapping[str, Any]) -> str:
        try:
            return calculate(_text(arguments, "expression"))
        except ValueError as error:
            raise ToolError(str(error)) from error

    return Tool("calculator", "Calculate with + - * / and parentheses.", _parameters("expression"), call)


def python(cpu_seconds: int = 5, wall_seconds: float = 20.0, memory_mib: int = 512) -> Tool:
    """Return a tool that runs Python programs in the sandbox; each call starts with nothing.

    Args:
        cpu_seconds: see `rayrlhf.rewards.sandbox.Limits`, like the others.
    """
    limits = Limits(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_mib=memory_mib)

    async def call(arguments: Mapping[str, Any]) -> str:
        program = {"main.py": _text(arguments, "code")}
        async with _programs(asyncio.get_running_loop()):
            outcome = await asyncio.to_thread(run_program, program, limits=limits)
        if outcome.status is None:
            raise ToolError(TIMED_OUT)
        if outcome.status:
            last = outcome.stderr.strip().splitlines()[-1:] or [f"exit code {outcome.status}"]
            raise ToolError("\n".join(filter(None, [outcome.stdout.strip(), *last])))
        return outcome.stdout.strip()

    return Tool("python", "Run a Python program and read what it prints.", _parameters("code"), call)


def search(path: str, field: str = "text", results: int = 3) -> Tool:
    """Return a search by BM25 in the rows of a dataset.

    Args:
        path: JSON Lines, Parquet, or what `data.train.path` reads.
        field: column with the text.
        results: maximum texts of an answer.

    Raises:
        UserError: the rows cannot be read, or none has a word.
    """
    with _INDEXING:
        texts, index = _index(path, field, Path.cwd())

    async def call(arguments: Mapping[str, Any]) -> str:
        found = index.best(_text(arguments, "query"), results)
        return "\n\n".join(texts[place] for place in found) or "nothing found"

    return Tool("search", "Search texts by their words.", _parameters("query"), call)


TOOLS: Registry[Callable[..., Tool]] = Registry(
    "environment.arguments.tools", {"calculator": calculator, "python": python, "search": search}
)
"""Functions that return a `Tool`."""


def make_tools(given: object) -> list[Tool]:
    """Return the tools of a list.

    Args:
        given: names, or {name, and arguments of its function}.

    Raises:
        UserError: it is no such list, a tool is unknown, or its arguments do not fit.
    """
    if not isinstance(given, list | tuple):
        raise UserError(f"environment.arguments.tools: expected a list of names, found {given!r:.80}")
    tools = []
    for one in given:
        arguments = dict(one) if isinstance(one, Mapping) else {"name": one}
        name = arguments.pop("name", None)
        if not isinstance(name, str):
            raise UserError(f"environment.arguments.tools: expected a name or {{name, ...}}, found {one!r:.80}")
        where = f"environment.arguments.tools {name!r}"
        tool = bind_arguments(where, TOOLS.resolve(name), arguments)()
        if not isinstance(tool, Tool):
            raise UserError(f"{where}: it returned {type(tool).__name__}, expected a Tool")
        tools.append(tool)
    return tools


def _parameters(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": "string"}}, "required": [name]}


def _text(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise ToolError(f"expected text in {name}")
    return value


@cache
def _programs(loop: asyncio.AbstractEventLoop) -> asyncio.Semaphore:
    """Return the limit of programs at a time in an event loop."""
    return asyncio.Semaphore(os.cpu_count() or 1)


@cache
def _index(path: str, field: str, folder: Path) -> tuple[list[str], WordIndex]:
    """Return texts and index of a dataset; `folder` is what a relative path refers to."""
    rows = read_rows(DatasetSection(path=path))
    texts = []
    for number, row in zip(rows.numbers, rows.values, strict=True):
        text = row.get(field)
        if not isinstance(text, str):
            raise UserError(f"environment.arguments.tools 'search': {path}: row {number}: expected text in {field!r}")
        texts.append(text)
    return texts, WordIndex.build(texts)
