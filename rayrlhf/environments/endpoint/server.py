"""Chat completions endpoint for agents, compatible with OpenAI's API.

It listens on the loopback address only. A session is identified by its bearer token; a request without the token of an open
session is refused. Every request becomes a `Call` in a queue. The player takes it from there and resolves it with a completion
or a refusal, while the request waits in the server's event loop. Agents cannot set sampling parameters: temperature and the
like belong to the run, since trainer and rollout engine must agree. Options that would change the returned text (streams,
several choices, tools, other stop strings) are refused by name instead of being ignored.
"""

import asyncio
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rayrlhf.data.messages import Message
from rayrlhf.data.templates import check_turns
from rayrlhf.errors import UserError

LOOPBACK = "127.0.0.1"
MODEL = "policy"
"""Name of the only model; requests may give any."""
MAX_BYTES = 8 * 2**20
"""Maximum size of a request."""
BACKLOG = 2048
"""Connections that may wait to be accepted."""
CLOSE_SECONDS = 5.0
"""Maximum wait for the end of the server's thread."""
KEEP_ALIVE_SECONDS = 600
"""Time for which an idle connection stays open. Clients reuse connections, and a closed one would fail a request."""


class Refusal(Exception):
    """Reason why a request gets no completion.

    Args:
        code: OpenAI's error code, such as `context_length_exceeded`.
    """

    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Completion(NamedTuple):
    """Completion of a request: text, finish reason ("stop" or "length"), and token counts."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Call:
    """A waiting request.

    Attributes:
        token: bearer token of the session.
        max_tokens: the agent's limit of the completion; None for no limit of its own.
        reply: resolved with a `Completion`, or a `Refusal` as its exception.
    """

    token: str
    messages: list[Message]
    max_tokens: int | None
    reply: Future[Completion] = field(default_factory=Future)


class ChatServer:
    """HTTP server that accepts requests from its creation until `close`.

    All requests wait in one event loop, in a thread of its own.

    Attributes:
        calls: incoming requests, in order; the player adds its own events.
        url: base address for clients.

    Args:
        stop: stop strings of the rollout engine; a request may name these and no others.
    """

    def __init__(self, stop: Collection[str] = ()) -> None:
        self.calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stop = frozenset(stop)
        self._open: set[str] = set()
        self._socket = socket.create_server((LOOPBACK, 0), backlog=BACKLOG)
        self.url = f"http://{LOOPBACK}:{self._socket.getsockname()[1]}/v1"
        application = Starlette(
            routes=[
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
            ],
            exception_handlers={Refusal: _refuse, 404: _not_found, 405: _not_found, ClientDisconnect: _gone},
        )
        self._http = uvicorn.Server(
            uvicorn.Config(
                application,
                lifespan="off",
                loop="asyncio",
                log_config=None,
                log_level="critical",
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(target=self._http.run, args=([self._socket],), name="chat", daemon=True)
        self._thread.start()

    def admit(self) -> str:
        """Open a session; returns its bearer token."""
        token = secrets.token_urlsafe(24)
        self._open.add(token)
        return token

    def dismiss(self, token: str) -> None:
        """Close a session: refuse its further requests."""
        self._open.discard(token)

    def close(self) -> None:
        """Stop listening."""
        self._open.clear()
        self._http.should_exit = True
        self._thread.join(CLOSE_SECONDS)

    async def _models(self, request: Request) -> Response:
        self._session(request)
        return _response({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "rayrlhf"}]})

    async def _complete(self, request: Request) -> Response:
        body = await _body(request)
        call = read_call(self._session(request), body, self.stop)
        self.calls.put(call)
        return _response(_completion(await _reply(request, call)))

    def _session(self, request: Request) -> str:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or token not in self._open:
            raise Refusal(HTTPStatus.UNAUTHORIZED, "invalid_api_key", "the bearer token belongs to no open session")
        return token


async def _body(request: Request) -> bytes:
    """Read a request up to the maximum size."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BYTES:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_long", f"expected a request up to {MAX_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


async def _reply(request: Request, call: Call) -> Completion:
    """Wait for the completion, which is cancelled if the client disconnects."""
    reply = asyncio.wrap_future(call.reply)
    gone = asyncio.ensure_future(_disconnection(request))
    waits: set[asyncio.Future[Any]] = {reply, gone}
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not reply.done():
            reply.cancel()
            raise ClientDisconnect
        return reply.result()
    finally:
        gone.cancel()


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _response(content: dict[str, Any], status: int = HTTPStatus.OK) -> Response:
    # Clients retry after 5xx, but a refusal is final.
    return JSONResponse(content, status, {"x-should-retry": "false"})


async def _refuse(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    error = {"message": str(refusal), "type": "invalid_request_error", "code": refusal.code, "param": None}
    return _response({"error": error}, refusal.status)


async def _not_found(request: Request, error: Exception) -> Response:
    message = f"expected /v1/chat/completions or /v1/models, found {request.url.path}"
    return await _refuse(request, Refusal(HTTPStatus.NOT_FOUND, "not_found", message))


async def _gone(request: Request, error: Exception) -> Response:
    """Return a response that no client reads."""
    return Response(status_code=HTTPStatus.BAD_REQUEST)


def read_call(token: str, body: bytes, stop: Collection[str] = ()) -> Call:
    """Parse and check a request for a completion.

    Args:
        token: bearer token of the session.
        body: JSON of OpenAI's API.
        stop: stop strings of the rollout engine.

    Raises:
        Refusal: a field is invalid or unsupported; the message names it.
    """
    try:
        fields = json.loads(body)
        if not isinstance(fields, dict) or not isinstance(fields.get("messages"), list):
            raise _bad("messages", "expected a list of messages")
        messages = check_turns([_plain(message) for message in fields["messages"]], "messages")
        json.dumps(messages, ensure_ascii=False).encode()  # a lone surrogate raises a ValueError
    except (ValueError, UserError) as error:
        raise _bad("messages", str(error)) from error
    if messages[-1]["role"] == "assistant":
        raise _bad("messages", "the last message is the assistant's; a completion cannot be continued")
    own = fields.get("stop") or []
    words = {str(word) for word in (own if isinstance(own, list) else [own])}
    for name, wrong in {
        "stream": bool(fields.get("stream")),
        "n": fields.get("n") not in (None, 1),
        "tools": bool(fields.get("tools") or fields.get("functions")),
        "logprobs": bool(fields.get("logprobs")),
        "response_format": (fields.get("response_format") or {"type": "text"}) != {"type": "text"},
        "stop": not words <= set(stop),
    }.items():
        if wrong:
            hint = "; set stop strings in rollout.stop" if name == "stop" else ""
            raise _bad(name, f"{name} is not supported by the policy in training{hint}")
    limit = fields.get("max_completion_tokens") or fields.get("max_tokens")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise _bad("max_tokens", f"expected a whole number from 1 on, found {limit!r}")
    return Call(token, messages, limit)


def _plain(message: object) -> Any:
    """Reduce a message to its text: join text parts, leave anything else to the check."""
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if content is None and message.get("role") == "assistant":
        content = ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    role = message.get("role")
    return {"role": "system" if role == "developer" else role, "content": content}


def _bad(param: str, message: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, f"invalid_{param}", message)


def _completion(completion: Completion) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": completion.text},
                "finish_reason": completion.finish_reason,
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "total_tokens": completion.prompt_tokens + completion.completion_tokens,
        },
    }
