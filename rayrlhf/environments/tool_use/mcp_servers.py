"""Model Context Protocol servers as tools: processes over stdio, or streamable HTTP on allowed hosts.

A connection belongs to a task of its own, because the client's cancel scopes must end in the task in which they began. The
agents of a replica share a connection. If a server has died, its connection is dropped, and the next sample starts the server
again.
"""

import asyncio
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from rayrlhf.environments.tool_use.tool import Tool, ToolError
from rayrlhf.errors import UserError

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
KEYS = ("command", "env", "cwd", "url")
ANSWER_SECONDS = 60.0
"""Maximum time of a server for one answer; `environment.timeout_seconds` ends an agent before."""
_WHERE = "environment.arguments.servers"


class Server:
    """One connection, shared by the agents of an event loop.

    Attributes:
        label: the command or address.
    """

    def __init__(self, section: Mapping[str, Any], allowed_hosts: Sequence[str]) -> None:
        """Check a server's section: {command: [...], env, cwd} or {url}.

        Raises:
            UserError: it has other keys, or its host is not allowed.
        """
        self.label, self._section = _checked(section, allowed_hosts), section
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed with the process
        self._stop = asyncio.Event()
        self._ready: asyncio.Future[tuple[Any, list[Any]]] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run())
        self.lost = False

    async def tools(self) -> list[Tool]:
        """Return the server's tools.

        Raises:
            UserError: the server does not start.
        """
        client, found = await asyncio.shield(self._ready)
        calls = {one.name: partial(self._call, client, one.name) for one in found}
        return [Tool(one.name, one.description or "", one.input_schema, calls[one.name]) for one in found]

    def close(self) -> None:
        """End the connection and its process."""
        self._stop.set()

    async def _call(self, client: Any, name: str, arguments: Mapping[str, Any]) -> str:
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED, REQUEST_TIMEOUT

        try:
            result = await client.call_tool(name, dict(arguments))
        except MCPError as error:
            if error.error.code not in (CONNECTION_CLOSED, REQUEST_TIMEOUT):
                raise ToolError(error.error.message) from error  # the policy's arguments, say
            self.lost = True
            what = f"{error.error.message} in a call of {name}{self._said()}"
            hint = "its samples are played again with a new one; see its own log if this repeats"
            raise RuntimeError(f"MCP server {self.label}: {what}; {hint}") from error
        text = "\n".join(part.text if part.type == "text" else f"[{part.type}]" for part in result.content)
        if result.is_error:
            raise ToolError(text)
        return text

    async def _run(self) -> None:
        logging.getLogger("mcp.client.stdio").setLevel(logging.CRITICAL)  # it logs a traceback of each line that is no message
        section = self._section
        transport: Any = section.get("url")
        try:
            from mcp import Client, StdioServerParameters, stdio_client

            if transport is None:
                program, *rest = section["command"]
                values = {"env": section.get("env"), "cwd": section.get("cwd")}
                transport = stdio_client(StdioServerParameters(command=program, args=rest, **values), errlog=self._errors)
            async with Client(transport, read_timeout_seconds=ANSWER_SECONDS) as client:
                self._ready.set_result((client, await _all_tools(client)))
                await self._stop.wait()
        except Exception as error:  # noqa: BLE001 - a server fails in many ways
            self.lost = True
            if not self._ready.done():
                expected = "expected a server of the Model Context Protocol"
                self._ready.set_exception(UserError(f"{_WHERE}: {self.label}: {_first(error)}{self._said()}; {expected}"))

    def _said(self) -> str:
        """Return the last line that the server's process wrote to standard error."""
        file = self._errors.fileno()
        end = os.pread(file, 4000, max(0, os.fstat(file).st_size - 4000)).decode(errors="replace")
        lines = [line.strip(" │╰╯─") for line in end.splitlines()]
        last = next((line for line in reversed(lines) if line), "")
        return f" ({last[:200]})" if last else ""


_servers: "WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Server]]" = WeakKeyDictionary()


async def server_tools(servers: Sequence[Any], allowed_hosts: Sequence[str] = ()) -> list[Tool]:
    """Return the tools of servers.

    A server starts at its first use in an event loop.

    Args:
        servers: sections, see `Server`.
        allowed_hosts: hosts of addresses besides this machine's own.

    Raises:
        UserError: a section is invalid, a server does not start, or two tools have the same name.
    """
    if not isinstance(servers, list | tuple):
        raise UserError(f"{_WHERE}: expected a list of {{command: [...]}} or {{url: ...}}, found {servers!r:.80}")
    running = _servers.setdefault(asyncio.get_running_loop(), {})
    tools: list[Tool] = []
    for section in servers:
        known = running.get(repr(section))
        if known is None or known.lost:
            if known is not None:
                known.close()
            known = running[repr(section)] = Server(section, allowed_hosts)
        tools += await known.tools()
    return tools


async def _all_tools(client: Any) -> list[Any]:
    found, cursor = [], None
    while True:
        page = await client.list_tools(cursor=cursor)
        found += page.tools
        cursor = page.next_cursor
        if cursor is None:
            return found


def _checked(section: object, allowed_hosts: Sequence[str]) -> str:
    """Return the name of a server in messages."""
    if not isinstance(section, Mapping) or set(section) - set(KEYS) or ("command" in section) == ("url" in section):
        raise UserError(f"{_WHERE}: expected {{command: [...], env, cwd}} or {{url: ...}}, found {section!r:.120}")
    if "command" in section:
        command = section["command"]
        if not isinstance(command, list | tuple) or not command or not all(isinstance(part, str) for part in command):
            raise UserError(f"{_WHERE}: command: expected a list of texts, found {command!r:.120}")
        return " ".join([Path(command[0]).name, *command[1:]])
    url = str(section["url"])
    host = urlsplit(url).hostname
    if urlsplit(url).scheme not in ("http", "https") or host not in (*LOOPBACK_HOSTS, *allowed_hosts):
        allowed = ", ".join([*LOOPBACK_HOSTS, *allowed_hosts])
        hint = "name others in environment.arguments.allowed_hosts"
        raise UserError(f"{_WHERE}: {url}: expected http(s) on one of {allowed}; {hint}")
    return url


def _first(error: BaseException) -> str:
    """Return the first error of a group in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return " ".join(str(error).split()) or type(error).__name__
