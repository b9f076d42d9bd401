"""HTTP endpoint for agents in the dialects of OpenAI's and Anthropic's APIs.

It listens on the loopback address only. A session is identified by its bearer token; a request without the token of an open
session is refused. Every request becomes a `Call` in a queue. The player takes it from there and resolves it with completions
or a refusal, while the request waits in the server's event loop. Agents cannot set sampling parameters: temperature and other
sampling settings belong to the run, since trainer and rollout engine must agree.
"""

import asyncio
import json
import queue
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple

import uvicorn
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rayrlhf.environments.endpoint.call import MODEL, Call, Completion, Refusal
from rayrlhf.environments.endpoint.chat import read_chat, stream_chat, write_chat, write_error
from rayrlhf.environments.endpoint.fields import parse_fields
from rayrlhf.environments.endpoint.messages import read_messages, stream_message, write_message, write_message_error
from rayrlhf.environments.endpoint.responses import read_response, stream_response, write_response

LOOPBACK = "127.0.0.1"
MAX_BYTES = 8 * 2**20
"""Maximum size of a request."""
BODY_SECONDS = 60.0
"""Maximum time in which a request arrives."""
BACKLOG = 2048
"""Connections that may wait to be accepted."""
CLOSE_SECONDS = 5.0
"""Maximum wait for the end of the server's thread."""
KEEP_ALIVE_SECONDS = 600
"""Time for which an idle connection stays open. Clients reuse connections, and a closed one would fail a request."""
STREAM_SECONDS = 5.0
"""Time after which a stream starts before its completion is finished. Until then a refusal is an error of HTTP."""
PING_SECONDS = 10.0
"""Time between comments in such a stream. Clients give up a response without any byte for a minute or so."""


class Dialect(NamedTuple):
    """One API: its path, and functions between its JSON and calls.

    Attributes:
        read: makes a call of a bearer token and fields.
        write: returns the response of fields and completions.
        stream: yields the response's server-sent events.
        error: returns the response of a refusal.
    """

    path: str
    read: Callable[[str, Mapping[str, Any]], Call]
    write: Callable[[Mapping[str, Any], Sequence[Completion]], dict[str, Any]]
    stream: Callable[[Mapping[str, Any], Sequence[Completion]], Iterator[str]]
    error: Callable[[Refusal], dict[str, Any]]


DIALECTS = (
    Dialect("/v1/chat/completions", read_chat, write_chat, stream_chat, write_error),
    Dialect("/v1/messages", read_messages, write_message, stream_message, write_message_error),
    Dialect("/v1/responses", read_response, write_response, stream_response, write_error),
)


class ChatServer:
    """HTTP server that accepts requests from its creation until `close`.

    All requests wait in one event loop, in a thread of its own.

    Attributes:
        calls: incoming requests, in order; the player adds its own events.
        url: base address for clients.
    """

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._open: set[str] = set()
        self._socket = socket.create_server((LOOPBACK, 0), backlog=BACKLOG)
        self.url = f"http://{LOOPBACK}:{self._socket.getsockname()[1]}/v1"
        application = Starlette(
            routes=[
                Route("/v1/models", self._models, methods=["GET"]),
                *(Route(dialect.path, self._handler(dialect), methods=["POST"]) for dialect in DIALECTS),
            ],
            exception_handlers={Refusal: _refuse, 404: _not_found, 405: _not_found},
        )
        self._http = uvicorn.Server(
            uvicorn.Config(
                application,
                lifespan="off",
                loop="auto",  # uvloop where it is installed
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
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

    def _handler(self, dialect: Dialect) -> Callable[[Request], Awaitable[Response]]:
        return partial(self._complete, dialect=dialect)

    async def _complete(self, request: Request, dialect: Dialect) -> Response:
        try:
            token = self._session(request)
            fields = parse_fields(await _body(request))
            call = dialect.read(token, fields)
            self.calls.put(call)
            reply = asyncio.wrap_future(call.reply)
            if not await _finished(request, reply, STREAM_SECONDS if fields.get("stream") else None):
                return EventSourceResponse(_late_events(dialect, fields, reply), ping=PING_SECONDS, sep="\n")
            completions = reply.result()
        except Refusal as refusal:
            return _response(dialect.error(refusal), refusal.status)
        except ClientDisconnect:
            return Response(status_code=HTTPStatus.BAD_REQUEST)
        if fields.get("stream"):
            return Response("".join(dialect.stream(fields, completions)), media_type="text/event-stream")
        return _response(dialect.write(fields, completions))

    def _session(self, request: Request) -> str:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        token = token if kind.lower() == "bearer" else request.headers.get("x-api-key", "")
        if token not in self._open:
            raise Refusal(HTTPStatus.UNAUTHORIZED, "invalid_api_key", "the bearer token belongs to no open session")
        return token


async def _body(request: Request) -> bytes:
    """Read a request up to the maximum size and time."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > MAX_BYTES:
                    message = f"expected a request up to {MAX_BYTES} bytes"
                    raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_long", message)
                parts.append(part)
    except TimeoutError as error:
        message = f"expected the whole request within {BODY_SECONDS:g} s"
        raise Refusal(HTTPStatus.REQUEST_TIMEOUT, "timeout", message) from error
    return b"".join(parts)


async def _finished(request: Request, reply: "asyncio.Future[list[Completion]]", seconds: float | None) -> bool:
    """Wait for completions, which are cancelled if the client disconnects; returns False after `seconds`."""
    gone = asyncio.ensure_future(_disconnection(request))
    waits: set[asyncio.Future[Any]] = {reply, gone}
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not reply.done() and gone.done():
            reply.cancel()
            raise ClientDisconnect
        return reply.done()
    finally:
        gone.cancel()


async def _late_events(
    dialect: Dialect, fields: Mapping[str, Any], reply: "asyncio.Future[list[Completion]]"
) -> AsyncIterator[bytes]:
    """Yield the server-sent events of a completion once it is finished, or of its refusal.

    The completion is cancelled if the client disconnects.
    """
    try:
        completions = await reply
    except Refusal as refusal:
        yield f"event: error\ndata: {json.dumps(dialect.error(refusal))}\n\n".encode()
        return
    for event in dialect.stream(fields, completions):
        yield event.encode()


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _response(content: dict[str, Any], status: int = HTTPStatus.OK) -> Response:
    # Clients retry after 5xx, but a refusal is final.
    # The rest of a request that was not read in time would be taken for the next one.
    closing = {"connection": "close"} if status == HTTPStatus.REQUEST_TIMEOUT else {}
    return JSONResponse(content, status, {"x-should-retry": "false"} | closing)


async def _refuse(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return _response(write_error(refusal), refusal.status)


async def _not_found(request: Request, error: Exception) -> Response:
    paths = ", ".join(["/v1/models", *(dialect.path for dialect in DIALECTS)])
    message = f"expected one of {paths}, found {request.method} {request.url.path}"
    return await _refuse(request, Refusal(HTTPStatus.NOT_FOUND, "not_found", message))
