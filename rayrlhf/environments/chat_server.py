"""Chat completions endpoint for agents, compatible with OpenAI's API.

It listens on the loopback address only. A session is identified by its bearer token; a request without the token of an open
session is refused. Every request becomes a `Call` in a queue. The player takes it from there and resolves it with a completion
or a refusal, while the request waits in its own thread. Agents cannot set sampling parameters: temperature and the like belong
to the run, since trainer and rollout engine must agree. Options that would change the returned text (streams, several choices,
tools, other stop strings) are refused by name instead of being ignored.
"""

import json
import queue
import secrets
import threading
import time
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from rayrlhf.data.messages import Message
from rayrlhf.data.templates import check_turns
from rayrlhf.errors import UserError

LOOPBACK = "127.0.0.1"
MODEL = "policy"
"""Name of the only model; requests may give any."""
MAX_BYTES = 8 * 2**20
"""Maximum size of a request."""


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
        self._http = _Server((LOOPBACK, 0), _Handler)
        self._http.chat = self
        self.url = f"http://{LOOPBACK}:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.1,), name="chat", daemon=True).start()

    def admit(self) -> str:
        """Open a session; returns its bearer token."""
        token = secrets.token_urlsafe(24)
        self._open.add(token)
        return token

    def dismiss(self, token: str) -> None:
        """Close a session: refuse its further requests."""
        self._open.discard(token)

    def is_open(self, token: str) -> bool:
        """Return True if the token belongs to an open session."""
        return token in self._open

    def close(self) -> None:
        """Stop listening."""
        self._open.clear()
        self._http.shutdown()
        self._http.server_close()


class _Server(ThreadingHTTPServer):
    chat: ChatServer
    daemon_threads = True
    request_queue_size = 1024


class _Handler(BaseHTTPRequestHandler):
    """Handler of `POST /v1/chat/completions` and `GET /v1/models`."""

    server: _Server
    server_version, sys_version = "rayrlhf", ""
    protocol_version = "HTTP/1.1"
    timeout = 600

    def do_GET(self) -> None:
        """List the model."""
        try:
            self._session()
            self._routed("/v1/models")
            self._send(HTTPStatus.OK, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "rayrlhf"}]})
        except Refusal as refusal:
            self._refuse(refusal)

    def do_POST(self) -> None:
        """Complete a conversation."""
        try:
            body = self._body()
            token = self._session()
            self._routed("/v1/chat/completions")
            call = read_call(token, body, self.server.chat.stop)
            self.server.chat.calls.put(call)
            self._send(HTTPStatus.OK, _completion(call.reply.result()))
        except Refusal as refusal:
            self._refuse(refusal)
        except (BrokenPipeError, ConnectionResetError):  # the agent disconnected
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def _session(self) -> str:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not self.server.chat.is_open(token):
            raise Refusal(HTTPStatus.UNAUTHORIZED, "invalid_api_key", "the bearer token belongs to no open session")
        return token

    def _routed(self, path: str) -> None:
        if self.path.partition("?")[0].rstrip("/") != path:
            raise Refusal(HTTPStatus.NOT_FOUND, "not_found", f"expected /v1/chat/completions or /v1/models, found {self.path}")

    def _body(self) -> bytes:
        """Read the whole request even if it is refused: the connection is reused."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BYTES:
            self.close_connection = True
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_long", f"expected Content-Length up to {MAX_BYTES}")
        return self.rfile.read(int(length))

    def _refuse(self, refusal: Refusal) -> None:
        error = {"message": str(refusal), "type": "invalid_request_error", "code": refusal.code, "param": None}
        self._send(refusal.status, {"error": error})

    def _send(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        # Clients retry after 5xx, but a refusal is final.
        self.send_header("x-should-retry", "false")
        self.end_headers()
        self.wfile.write(body)


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
