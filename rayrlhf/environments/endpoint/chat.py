"""OpenAI's chat completions: reads requests, writes completions and streams.

A stream sends its events when the completion is finished. After a few seconds it sends comments; before that a refusal is
still an HTTP error.
"""

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rayrlhf.environments.endpoint.call import MODEL, Call, Completion, Refusal, invalid
from rayrlhf.environments.endpoint.fields import (
    MAX_COUNT,
    check_known,
    choice_of,
    conversation_of,
    count_of,
    flag_of,
    form_of,
    path_of,
    seed_of,
    stops_of,
    template_of,
    tools_of,
)

KNOWN = frozenset(
    (
        *("messages", "model", "max_tokens", "max_completion_tokens", "n", "seed", "stop", "stream", "stream_options"),
        *("tools", "tool_choice", "parallel_tool_calls", "response_format", "chat_template_kwargs", "logprobs"),
        *("user", "metadata", "store", "modalities"),
    )
)


def read_chat(token: str, fields: Mapping[str, Any]) -> Call:
    """Read a request.

    Args:
        token: bearer token of the session.

    Raises:
        Refusal: a field is invalid or unsupported; the message names it.
    """
    messages = conversation_of(fields.get("messages"))
    check_known(fields, KNOWN)
    if fields.get("modalities") not in (None, ["text"]):
        raise invalid("modalities", "modalities: expected text only")
    if not isinstance(fields.get("stream_options"), dict | None):
        raise invalid("stream_options", "stream_options: expected an object")
    flag_of(fields, "stream", False)
    tools = tools_of(fields.get("tools"))
    limits = [count_of(fields.get(name), "max_tokens") for name in ("max_completion_tokens", "max_tokens")]
    return Call(
        token,
        messages,
        max_tokens=limits[0] or limits[1],
        tools=tools,
        template=template_of(fields.get("chat_template_kwargs")),
        **choice_of(fields.get("tool_choice"), tools)._asdict(),
        form=form_of(fields.get("response_format"), "response_format"),
        parallel=flag_of(fields, "parallel_tool_calls", True),
        count=count_of(fields.get("n"), "n", MAX_COUNT) or 1,
        stop=stops_of(fields.get("stop")),
        seed=seed_of(fields.get("seed")),
        logprobs=flag_of(fields, "logprobs", False),
        path=path_of(fields.get("metadata")),
    )


def write_chat(fields: Mapping[str, Any], completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the response of a request with these fields."""
    return _head("chat.completion") | {
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant"} | _message(completion) | {"refusal": None},
                "finish_reason": completion.finish_reason,
                "logprobs": _logprobs(completion) if fields.get("logprobs") else None,
            }
            for index, completion in enumerate(completions)
        ],
        "usage": _usage(completions),
    }


def stream_chat(fields: Mapping[str, Any], completions: Sequence[Completion]) -> Iterator[str]:
    """Yield the server-sent events of a response.

    Each choice has its role, reasoning, text, tool calls and end.
    """
    head = _head("chat.completion.chunk")

    def event(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: object = None) -> str:
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return _event(head | {"choices": [choice]} | usage)

    wants_usage = bool((fields.get("stream_options") or {}).get("include_usage"))
    usage: dict[str, Any] = {"usage": None} if wants_usage else {}
    for index, completion in enumerate(completions):
        yield event(index, {"role": "assistant", "content": ""})
        message = _message(completion)
        calls = message.pop("tool_calls", [])
        if message.get("reasoning_content"):
            yield event(index, {key: message[key] for key in ("reasoning_content", "reasoning")})
        if completion.text or fields.get("logprobs"):
            yield event(index, {"content": completion.text}, None, _logprobs(completion) if fields.get("logprobs") else None)
        for number, call in enumerate(calls):
            function = call["function"]
            yield event(index, {"tool_calls": [{"index": number} | call | {"function": function | {"arguments": ""}}]})
            part = {"index": number, "function": {"arguments": function["arguments"]}}
            yield event(index, {"tool_calls": [part]})
        yield event(index, {}, completion.finish_reason)
    if wants_usage:
        yield _event(head | {"choices": [], "usage": _usage(completions)})
    yield "data: [DONE]\n\n"


def write_error(refusal: Refusal) -> dict[str, Any]:
    """Return the error of a refused request."""
    return {"error": {"message": str(refusal), "type": "invalid_request_error", "code": refusal.code, "param": refusal.param}}


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _head(kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": MODEL}


def _message(completion: Completion) -> dict[str, Any]:
    calls = list(completion.tool_calls)
    message: dict[str, Any] = {"content": None if calls and not completion.text else completion.text}
    if completion.reasoning:
        message |= {"reasoning_content": completion.reasoning, "reasoning": completion.reasoning}
    return message | ({"tool_calls": calls} if calls else {})


def _logprobs(completion: Completion) -> dict[str, Any]:
    tokens = [
        {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
        for text, logprob in completion.tokens
    ]
    return {"content": tokens, "refusal": None}


def _usage(completions: Sequence[Completion]) -> dict[str, int]:
    prompt, sampled = completions[0].prompt_tokens, sum(completion.completion_tokens for completion in completions)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}
