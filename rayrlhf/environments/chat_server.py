"""The chat completions endpoint that agents talk to, as an OpenAI server would answer them.

It listens on the loopback address only. A session is known by its bearer token; a request without one that is open is refused.
Every request becomes a `Call`, which whoever runs the sampler takes from the queue and settles with an answer or a refusal; the
request waits for that in a thread of its own. How tokens are drawn is not the agent's to say: temperature and the like are the
run's, since trainer and sampler must agree. What would change the words that come back (streams, several choices, tools, stop
strings of its own) is refused by name instead of being ignored.
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

from rayrlhf.data.templates import Message, check_turns
from rayrlhf.errors import UserError

LOOPBACK = "127.0.0.1"
MODEL = "policy"
"""Name of the only model; agents may ask for any."""
MOST_BYTES = 8 * 2**20
"""Longest request."""


class Refusal(Exception):
    """Why a request gets no completion.

    Args:
        status: of HTTP.
        code: OpenAI's word for it, such as `context_length_exceeded`.
        message: one line.
    """

    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Completion(NamedTuple):
    """What the policy said, why it ended ("stop" or "length"), and the tokens it read and sampled."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Call:
    """A request that waits.

    Attributes:
        token: of the session.
        messages: the whole conversation.
        max_tokens: longest answer that the agent wants; None for no bound of its own.
        reply: settled with a `Completion`, or a `Refusal` as its exception.
    """

    token: str
    messages: list[Message]
    max_tokens: int | None
    reply: Future[Completion] = field(default_factory=Future)


class ChatServer:
    """Takes requests from when it is made until `close`.

    Attributes:
        calls: what came in, in order; others may put their own events into it.
        url: base address for clients.

    Args:
        stop: stop strings that the sampler has; a request may name them and no others.
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
        """Refuse a session's requests from now on."""
        self._open.discard(token)

    def is_open(self, token: str) -> bool:
        """Whether the token is that of a session that goes on."""
        return token in self._open

    def close(self) -> None:
        """Listen no more."""
        self._open.clear()
        self._http.shutdown()
        self._http.server_close()


class _Server(ThreadingHTTPServer):
    chat: ChatServer
    daemon_threads = True
    request_queue_size = 1024


class _Handler(BaseHTTPRequestHandler):
    """Answers `POST /v1/chat/completions` and `GET /v1/models`."""

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
        except (BrokenPipeError, ConnectionResetError):  # the agent went away meanwhile
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def _session(self) -> str:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not self.server.chat.is_open(token):
            raise Refusal(HTTPStatus.UNAUTHORIZED, "invalid_api_key", "the bearer token is not that of an open session")
        return token

    def _routed(self, path: str) -> None:
        if self.path.partition("?")[0].rstrip("/") != path:
            raise Refusal(HTTPStatus.NOT_FOUND, "not_found", f"only /v1/chat/completions and /v1/models are here: {self.path}")

    def _body(self) -> bytes:
        """Read the whole request, whatever is said to it then: the next one comes over the same connection."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            self.close_connection = True
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_long", f"expected Content-Length up to {MOST_BYTES}")
        return self.rfile.read(int(length))

    def _refuse(self, refusal: Refusal) -> None:
        error = {"message": str(refusal), "type": "invalid_request_error", "code": refusal.code, "param": None}
        self._send(refusal.status, {"error": error})

    def _send(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        # Clients repeat what failed with 5xx; what is refused here stays refused.
        self.send_header("x-should-retry", "false")
        self.end_headers()
        self.wfile.write(body)


def read_call(token: str, body: bytes, stop: Collection[str] = ()) -> Call:
    """Check a request for a completion.

    Args:
        token: of the session.
        body: JSON, as OpenAI's API has it.
        stop: stop strings that are in force anyway.

    Raises:
        Refusal: naming the field that is wrong, or not supported.
    """
    try:
        asked = json.loads(body)
        if not isinstance(asked, dict) or not isinstance(asked.get("messages"), list):
            raise _bad("messages", "expected a list of messages")
        messages = check_turns([_plain(message) for message in asked["messages"]], "messages")
    except (ValueError, UserError) as error:
        raise _bad("messages", str(error)) from error
    if messages[-1]["role"] == "assistant":
        raise _bad("messages", "the last message is the assistant's: an answer cannot be continued")
    own = asked.get("stop") or []
    words = {str(word) for word in (own if isinstance(own, list) else [own])}
    for name, wrong in {
        "stream": bool(asked.get("stream")),
        "n": asked.get("n") not in (None, 1),
        "tools": bool(asked.get("tools") or asked.get("functions")),
        "logprobs": bool(asked.get("logprobs")),
        "response_format": (asked.get("response_format") or {"type": "text"}) != {"type": "text"},
        "stop": not words <= set(stop),
    }.items():
        if wrong:
            hint = "; stop strings belong into rollout.stop" if name == "stop" else ""
            raise _bad(name, f"{name} is not supported by the policy in training{hint}")
    limit = asked.get("max_completion_tokens") or asked.get("max_tokens")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise _bad("max_tokens", f"expected a whole number from 1 on, found {limit!r}")
    return Call(token, messages, limit)


def _plain(message: object) -> Any:
    """A message with its text alone; parts that are text are joined, anything else is left for the check to refuse."""
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


def _completion(said: Completion) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": said.text},
                "finish_reason": said.finish_reason,
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": said.prompt_tokens,
            "completion_tokens": said.completion_tokens,
            "total_tokens": said.prompt_tokens + said.completion_tokens,
        },
    }
