"""Anthropic's messages: reads requests, writes messages and streams of their events."""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from rayrlhf.environments.endpoint.call import MODEL, Call, Completion, Refusal, invalid
from rayrlhf.environments.endpoint.fields import (
    check_known,
    choice_of,
    conversation_of,
    count_of,
    flag_of,
    form_of,
    note,
    path_of,
    seed_of,
    stops_of,
    template_of,
    tools_of,
)

KNOWN = frozenset(
    (
        *("messages", "model", "max_tokens", "system", "stop_sequences", "stream", "tools", "tool_choice", "metadata"),
        *("seed", "chat_template_kwargs", "service_tier", "output_config", "output_format"),
    )
)
OWNERS = {
    "tool_use": "assistant",
    "thinking": "assistant",
    "redacted_thinking": "assistant",
    "tool_result": "user",
}
"""Role whose messages alone may have a block."""
ERRORS = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}


def read_messages(token: str, fields: Mapping[str, Any]) -> Call:
    """Read a request.

    Args:
        token: bearer token of the session.

    Raises:
        Refusal: a field is invalid or unsupported; the message names it.
    """
    given = fields.get("messages")
    if not isinstance(given, list):
        raise invalid("messages", "expected a list of messages")
    system = [{"role": "system", "content": _text(fields["system"], "system")}] if fields.get("system") else []
    messages = conversation_of([*system, *(part for message in given for part in _openai_messages(message))])
    check_known(fields, KNOWN)
    flag_of(fields, "stream", False)
    choice = fields.get("tool_choice")
    if not isinstance(choice, dict | None):
        raise invalid("tool_choice", "tool_choice: expected an object with a type")
    chosen = choice if (choice or {}).get("type") == "tool" else (choice or {}).get("type")
    config = fields.get("output_config")
    if not isinstance(config, dict | None):
        raise invalid("output_config", "output_config: expected an object")
    check_known({f"output_config.{key}": value for key, value in (config or {}).items()}, ("output_config.format",))
    tools = tools_of(_openai_tools(fields.get("tools")))
    return Call(
        token,
        messages,
        max_tokens=count_of(fields.get("max_tokens"), "max_tokens"),
        tools=tools,
        template=template_of(fields.get("chat_template_kwargs")),
        **choice_of(chosen, tools)._asdict(),
        form=form_of((config or {}).get("format") or fields.get("output_format"), "output_format"),
        parallel=not flag_of(choice or {}, "disable_parallel_tool_use", False),
        stop=stops_of(fields.get("stop_sequences"), "stop_sequences"),
        seed=seed_of(fields.get("seed")),
        path=path_of(fields.get("metadata")),
    )


def write_message(fields: Mapping[str, Any], completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the response of a request."""
    (completion,) = completions
    return _head(completion) | {"content": _blocks(completion)} | _end(completion)


def stream_message(fields: Mapping[str, Any], completions: Sequence[Completion]) -> Iterator[str]:
    """Yield the server-sent events of a response."""
    (completion,) = completions
    message = _head(completion) | {"content": [], "stop_reason": None, "stop_sequence": None}
    yield _event("message_start", message=message | {"usage": message["usage"] | {"output_tokens": 0}})
    for index, block in enumerate(_blocks(completion)):
        start, delta = _parts(block)
        yield _event("content_block_start", index=index, content_block=start)
        yield _event("content_block_delta", index=index, delta=delta)
        yield _event("content_block_stop", index=index)
    yield _event("message_delta", delta=_end(completion), usage={"output_tokens": completion.completion_tokens})
    yield _event("message_stop")


def write_message_error(refusal: Refusal) -> dict[str, Any]:
    """Return the error of a refused request."""
    kind = ERRORS.get(refusal.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(refusal), "code": refusal.code}}


def _parts(block: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an empty block and the delta that fills it."""
    match block["type"]:
        case "text":
            return block | {"text": ""}, {"type": "text_delta", "text": block["text"]}
        case "thinking":
            return block | {"thinking": ""}, {"type": "thinking_delta", "thinking": block["thinking"]}
        case _:
            return block | {"input": {}}, {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}


def _event(kind: str, **content: object) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | content)}\n\n"


def _head(completion: Completion) -> dict[str, Any]:
    usage = {"input_tokens": completion.prompt_tokens, "output_tokens": completion.completion_tokens}
    return {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": MODEL, "usage": usage}


def _end(completion: Completion) -> dict[str, Any]:
    reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    reason = "stop_sequence" if completion.stop and completion.finish_reason == "stop" else reasons[completion.finish_reason]
    return {"stop_reason": reason, "stop_sequence": completion.stop}


def _blocks(completion: Completion) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if completion.reasoning:
        blocks.append({"type": "thinking", "thinking": completion.reasoning, "signature": ""})
    if completion.text or not completion.tool_calls:
        blocks.append({"type": "text", "text": completion.text})
    for call in completion.tool_calls:
        function = call["function"]
        blocks.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": _object(function["arguments"])})
    return blocks


def _object(arguments: str) -> dict[str, Any]:
    """Return the arguments of a call as an object.

    Arguments that are not a JSON object become text under `arguments`.
    """
    try:
        parsed = json.loads(arguments)
    except ValueError:
        parsed = None
    return parsed if isinstance(parsed, dict) else {"arguments": arguments}


def _openai_messages(message: object) -> list[dict[str, Any]]:
    """Return a message in OpenAI's form.

    Each tool result is a message of its own, before the text.
    """
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "system"):
        raise invalid("messages", "expected messages with role user or assistant")
    if isinstance(content, str):
        return [{"role": message["role"], "content": content}]
    if not isinstance(content, list) or not content or not all(isinstance(block, dict) for block in content):
        raise invalid("messages", "content: expected text or a list of blocks")
    texts, calls, results, thoughts = [], [], [], []
    for block in content:
        if (owner := OWNERS.get(str(block.get("type")), message["role"])) != message["role"]:
            kind, role = block["type"], message["role"]
            raise invalid("messages", f"content: a block of type {kind} belongs to the {owner}, found one of the {role}")
        match block.get("type"):
            case "text":
                texts.append(_text([block], "messages"))
            case "tool_use":
                function = {"name": block.get("name"), "arguments": block.get("input") or {}}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case "tool_result":
                text = _text(block.get("content") or "", "messages")
                note("tool_result.is_error", block.get("is_error") or None)
                results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
            case "thinking":
                thoughts.append(str(block.get("thinking") or ""))
            case "redacted_thinking":
                note("redacted_thinking", block)
            case kind:
                raise invalid("messages", f"content: blocks of type {kind!r:.80} are not supported")
    if message["role"] == "assistant":
        more = ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": "".join(thoughts)} if any(thoughts) else {})
        return [{"role": "assistant", "content": "".join(texts)} | more]
    return [*results, *([{"role": message["role"], "content": "\n".join(texts)}] if texts else [])]


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, f"{where}: expected text or a list of text blocks")
    texts = [block.get("text") if isinstance(block, dict) and block.get("type") == "text" else None for block in content]
    if not all(isinstance(text, str) for text in texts):
        raise invalid(where, f"{where}: expected blocks of text")
    return "\n".join(map(str, texts))


def _openai_tools(tools: object) -> object:
    if not isinstance(tools, list):
        return tools
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, dict) or tool.get("type") not in (None, "custom"):
            raise invalid(
                "tools", f"tool {number}: expected {{name, description, input_schema}}; tools of the server have no host"
            )
    return [
        {
            "type": "function",
            "function": {
                "name": tool.get("name"),
                "description": "" if tool.get("description") is None else tool["description"],
                "parameters": tool.get("input_schema"),
            },
        }
        for tool in tools
    ]
