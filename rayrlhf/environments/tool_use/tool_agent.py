"""Built-in agents `tools` and `mcp`, which run the tool calls of the policy.

The conversation continues until a reply without a call. The reward is 1 if that reply equals the dataset's answer, else 0.
With `answer: null` it is 0, for runs in which other reward functions judge the response.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from rayrlhf.data.records import Prompt
from rayrlhf.environments.agent import Endpoint
from rayrlhf.environments.tool_use.mcp_servers import server_tools
from rayrlhf.environments.tool_use.tool import Tool, ToolError, make_tools
from rayrlhf.errors import UserError

MAX_CHARACTERS = 4000
"""Maximum characters of a tool's answer; the rest is cut."""


async def tools(
    prompt: Prompt,
    endpoint: Endpoint,
    tools: Sequence[Any] = (),
    servers: Sequence[Any] = (),
    allowed_hosts: Sequence[str] = (),
    answer: str | None = "answer",
    system_prompt: str | None = None,
) -> float:
    """Play a sample with tools of the package and of MCP servers.

    Args:
        tools: see `make_tools`.
        servers: see `server_tools`.
        allowed_hosts: see `server_tools`.
        answer: column of the dataset with the answer, compared as text without surrounding blanks; None gives a reward of 0.
        system_prompt: first message of conversations without one.

    Returns:
        1.0 for the right answer, else 0.0, also where no space is left for an answer.

    Raises:
        UserError: an argument is wrong, the dataset lacks the column, or the endpoint refuses tools.
    """
    if answer is not None and answer not in prompt.columns:
        columns = ", ".join(sorted(prompt.columns)) or "none"
        raise UserError(f"environment.arguments.answer: the dataset has no column {answer!r}; its columns are: {columns}")
    found = [*await asyncio.to_thread(make_tools, tools), *await server_tools(servers, allowed_hosts)]
    by_name = {tool.name: tool for tool in found}
    if len(by_name) < len(found) or not found:
        raise UserError(f"environment.arguments: expected tools with different names, found {[tool.name for tool in found]}")
    said = await converse(endpoint, opening(prompt, system_prompt), by_name)
    return float(answer is not None and said is not None and said.strip() == str(prompt.columns[answer]).strip())


async def mcp(
    prompt: Prompt,
    endpoint: Endpoint,
    servers: Sequence[Any],
    allowed_hosts: Sequence[str] = (),
    answer: str | None = "answer",
    system_prompt: str | None = None,
) -> float:
    """Play a sample with the tools of MCP servers; see `tools`."""
    return await globals()["tools"](prompt, endpoint, (), servers, allowed_hosts, answer, system_prompt)  # type: ignore[no-any-return]


def opening(prompt: Prompt, system_prompt: str | None = None) -> list[dict[str, Any]]:
    """Return the messages of a prompt."""
    messages: list[dict[str, Any]] = list(prompt.messages or [{"role": "user", "content": prompt.text}])
    first = [{"role": "system", "content": system_prompt}] if system_prompt and messages[0]["role"] != "system" else []
    return [*first, *messages]


async def converse(endpoint: Endpoint, messages: list[dict[str, Any]], tools: Mapping[str, Tool]) -> str | None:
    """Run the tool calls of the policy until a reply without one.

    Args:
        messages: grows by the conversation.
        tools: by name.

    Returns:
        That reply; None where the endpoint has no space for one.

    Raises:
        UserError: the endpoint refuses tools.
    """
    import httpx

    body = {"model": endpoint.model, "tools": [tool.schema for tool in tools.values()]}
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    # Plain HTTP on this machine; the player ends an agent that takes too long.
    async with httpx.AsyncClient(headers=headers, timeout=None, verify=False, trust_env=False) as client:  # noqa: S113, S501
        while True:
            response = await client.post(f"{endpoint.base_url}/chat/completions", json=body | {"messages": messages})
            content = response.json()
            if response.status_code == HTTPStatus.BAD_REQUEST:
                if content["error"]["code"] == "context_length_exceeded":
                    return None
                raise UserError(f"agent with tools: {content['error']['message']}")
            response.raise_for_status()
            message = content["choices"][0]["message"]
            messages.append(message)
            calls = message.get("tool_calls")
            if not calls:
                return str(message["content"] or "")
            answers = await asyncio.gather(*(_answer(call["function"], tools) for call in calls))
            for call, text in zip(calls, answers, strict=True):
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": text[:MAX_CHARACTERS]})


async def _answer(function: Mapping[str, Any], tools: Mapping[str, Tool]) -> str:
    """Return the text of a tool's answer, or of the fault of its call."""
    tool = tools.get(function["name"])
    if tool is None:
        return f"error: no tool {function['name']!r}; expected one of {', '.join(tools)}"
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        return "error: expected a JSON object as arguments"
    try:
        text = await tool.call(arguments)
    except ToolError as error:
        text = f"error: {error}"
    return text.encode("utf-8", "replace").decode()
