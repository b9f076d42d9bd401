"""A subset of OpenAI's responses: stateless text and function calls.

The whole conversation is in `input`, as with chat completions; nothing is stored.
"""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayrlhf.environments.endpoint.call import MODEL, Call, Completion, invalid
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
    template_of,
    tools_of,
)

KNOWN = frozenset(
    (
        *("input", "model", "instructions", "max_output_tokens", "stream", "tools", "tool_choice", "parallel_tool_calls"),
        *("text", "metadata", "store", "user", "seed", "chat_template_kwargs"),
    )
)
STATEFUL = ("previous_response_id", "conversation", "background", "prompt")


def read_response(token: str, fields: Mapping[str, Any]) -> Call:
    """Read a request.

    Args:
        token: bearer token of the session.

    Raises:
        Refusal: a field is invalid or unsupported; the message names it.
    """
    for name in STATEFUL:
        if fields.get(name):
            raise invalid(name, f"{name} is not supported: nothing is stored; expected the whole conversation in input")
    check_known(fields, KNOWN)
    flag_of(fields, "stream", False)
    form = fields.get("text") or {}
    if not isinstance(form, dict):
        raise invalid("text", "text: expected an object")
    tools = tools_of(_openai_tools(fields.get("tools")))
    check_known({f"text.{key}": value for key, value in form.items()}, ("text.format",))
    instructions = fields.get("instructions")
    system = [{"role": "system", "content": instructions}] if instructions else []
    return Call(
        token,
        conversation_of([*system, *_openai_messages(fields.get("input"))]),
        max_tokens=count_of(fields.get("max_output_tokens"), "max_output_tokens"),
        tools=tools,
        template=template_of(fields.get("chat_template_kwargs")),
        **choice_of(fields.get("tool_choice"), tools)._asdict(),
        form=form_of(form.get("format"), "text.format"),
        parallel=flag_of(fields, "parallel_tool_calls", True),
        seed=seed_of(fields.get("seed")),
        path=path_of(fields.get("metadata")),
    )


def write_response(fields: Mapping[str, Any], completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the response of a request."""
    (completion,) = completions
    return _finished(_head(fields), completion, _items(completion))


def stream_response(fields: Mapping[str, Any], completions: Sequence[Completion]) -> Iterator[str]:
    """Yield the server-sent events of a response."""
    (completion,) = completions
    head, items, number = _head(fields), _items(completion), 0

    def event(kind: str, **content: object) -> str:
        nonlocal number
        number += 1
        return f"event: {kind}\ndata: {json.dumps({'type': kind, 'sequence_number': number - 1} | content)}\n\n"

    yield event("response.created", response=head)
    for index, item in enumerate(items):
        place = {"item_id": item["id"], "output_index": index}
        match item["type"]:
            case "message":
                part = item["content"][0]
                text = part["text"]
                yield event(
                    "response.output_item.added", output_index=index, item=item | {"content": [], "status": "in_progress"}
                )
                place |= {"content_index": 0}
                yield event("response.content_part.added", part=part | {"text": ""}, **place)
                yield event("response.output_text.delta", delta=text, logprobs=[], **place)
                yield event("response.output_text.done", text=text, logprobs=[], **place)
                yield event("response.content_part.done", part=part, **place)
            case "function_call":
                said = item["arguments"]
                added = item | {"arguments": "", "status": "in_progress"}
                yield event("response.output_item.added", output_index=index, item=added)
                yield event("response.function_call_arguments.delta", delta=said, **place)
                yield event("response.function_call_arguments.done", arguments=said, name=item["name"], **place)
            case _:
                yield event("response.output_item.added", output_index=index, item=item)
        yield event("response.output_item.done", output_index=index, item=item)
    finished = _finished(head, completion, items)
    yield event(f"response.{finished['status']}", response=finished)


def _head(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "model": MODEL,
        "status": "in_progress",
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": fields.get("instructions"),
        "metadata": fields.get("metadata") or {},
        "parallel_tool_calls": fields.get("parallel_tool_calls") is not False,
        "tool_choice": fields.get("tool_choice") or "auto",
        "tools": fields.get("tools") or [],
        "temperature": None,
        "top_p": None,
    }


def _finished(head: Mapping[str, Any], completion: Completion, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    cut = completion.finish_reason == "length"
    sampled, prompt = completion.completion_tokens, completion.prompt_tokens
    usage = {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": sampled,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + sampled,
    }
    details = {"reason": "max_output_tokens"} if cut else None
    status = "incomplete" if cut else "completed"
    return {**head, "status": status, "output": list(items), "incomplete_details": details, "usage": usage}


def _items(completion: Completion) -> list[dict[str, Any]]:
    def named(kind: str) -> str:
        return f"{kind}_{secrets.token_hex(12)}"

    items: list[dict[str, Any]] = []
    if completion.reasoning:
        thought = {"type": "reasoning_text", "text": completion.reasoning}
        items.append({"type": "reasoning", "id": named("rs"), "summary": [], "content": [thought]})
    if completion.text or not completion.tool_calls:
        part = {"type": "output_text", "text": completion.text, "annotations": []}
        items.append({"type": "message", "id": named("msg"), "role": "assistant", "status": "completed", "content": [part]})
    for call in completion.tool_calls:
        function = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        items.append({"type": "function_call", "id": named("fc"), "call_id": call["id"], "status": "completed"} | function)
    return items


def _openai_messages(given: object) -> list[dict[str, Any]]:
    """Return input items as messages of chat completions.

    Neighboring items of the assistant (reasoning, text, calls) are one message.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise invalid("input", "input: expected text or a list of items")
    messages: list[dict[str, Any]] = []
    answer: dict[str, Any] | None = None
    for item in given:
        if not isinstance(item, dict):
            raise invalid("input", "input: expected items that are objects")
        kind = item.get("type") or "message"
        if kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(item.get("output"))})
        elif kind == "message" and item.get("role") != "assistant":
            messages.append({"role": item.get("role"), "content": _text(item.get("content"))})
        elif kind in ("message", "function_call", "reasoning"):
            if answer is None:
                answer = {"role": "assistant", "content": ""}
                messages.append(answer)
            _add(answer, kind, item)
            continue
        else:
            raise invalid("input", f"input: items of type {kind!r:.80} are not supported")
        answer = None
    return messages


def _add(answer: dict[str, Any], kind: str, item: Mapping[str, Any]) -> None:
    """Add an item of the assistant to its message."""
    if kind == "message":
        answer["content"] += _text(item.get("content"))
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        answer.setdefault("tool_calls", []).append({"id": item.get("call_id"), "type": "function", "function": function})
    else:
        for key in ("summary", "encrypted_content"):
            note(f"reasoning.{key}", item.get(key))
        if thought := _text(item.get("content") or ""):
            answer["reasoning_content"] = answer.get("reasoning_content", "") + thought


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    texts = [part.get("text") if isinstance(part, dict) else None for part in content] if isinstance(content, list) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise invalid("input", "input: expected text, or parts of text")
    return "".join(map(str, texts))


def _openai_tools(tools: object) -> object:
    if not isinstance(tools, list):
        return tools
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise invalid("tools", f"tool {number}: expected {{type: function, name, parameters}}")
    keys = ("name", "description", "parameters")
    return [{"type": "function", "function": {key: tool[key] for key in keys if key in tool}} for tool in tools]
