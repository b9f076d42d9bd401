"""Streams of the endpoint that start before their completion is finished."""

import queue
import threading
from http import HTTPStatus

import anthropic
import httpx
import openai
import pytest

from rayrlhf.environments.endpoint import server as module
from rayrlhf.environments.endpoint.call import Completion, Refusal, resolve
from rayrlhf.environments.endpoint.server import ChatServer

LATE_SECONDS = 1.0
MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "STREAM_SECONDS", 0.05)
    monkeypatch.setattr(module, "PING_SECONDS", 0.1)
    server = ChatServer()
    yield server
    server.close()


def resolve_late(server, result):
    """Resolve the next request when its stream has started."""

    def wait():
        call = server.calls.get(timeout=10)
        threading.Event().wait(LATE_SECONDS)
        resolve(call, result)

    threading.Thread(target=wait, daemon=True).start()


def open_stream(server, path="chat/completions", **fields):
    body = {"model": "m", "messages": MESSAGES, "stream": True} | fields
    headers = {"Authorization": f"Bearer {server.admit()}"}
    return httpx.stream("POST", f"{server.url}/{path}", json=body, headers=headers, timeout=10, verify=False)


def test_a_stream_has_comments_until_its_completion_is_finished(server):
    resolve_late(server, [Completion("hello", "stop", 3, 5)])
    with open_stream(server) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    comments = [line.startswith(": ping") for line in lines]
    assert comments[:2] == [True, True]
    assert not any(comments[comments.index(False) :])
    assert any('"content": "hello"' in line for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_clients_read_late_completions_and_raise_late_refusals(server):
    refusal = Refusal(HTTPStatus.BAD_REQUEST, "context_length_exceeded", "no space is left", "messages")
    client = openai.OpenAI(base_url=server.url, api_key=server.admit(), max_retries=0)
    resolve_late(server, [Completion("hello", "stop", 3, 5)])
    chunks = client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello"
    resolve_late(server, refusal)
    with pytest.raises(openai.APIError, match="no space is left"):
        list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
    other = anthropic.Anthropic(base_url=server.url.removesuffix("/v1"), api_key=server.admit(), max_retries=0)
    resolve_late(server, refusal)
    with pytest.raises(anthropic.APIError, match="no space is left"):
        list(other.messages.create(model="m", messages=MESSAGES, max_tokens=5, stream=True))


def test_a_refusal_in_time_is_an_error_of_http(server, monkeypatch):
    monkeypatch.setattr(module, "STREAM_SECONDS", 10)
    resolve_late(server, Refusal(HTTPStatus.BAD_REQUEST, "context_length_exceeded", "no space is left", "messages"))
    with open_stream(server) as response:
        assert response.status_code == HTTPStatus.BAD_REQUEST


def test_a_client_that_leaves_a_started_stream_cancels_its_completion(server):
    with open_stream(server) as response:
        call = server.calls.get(timeout=10)
        lines = response.iter_lines()  # A dropped iterator closes the response.
        assert next(lines).startswith(": ping")
        assert not call.reply.cancelled()
    for _ in range(100):
        if call.reply.cancelled():
            break
        threading.Event().wait(0.1)
    assert call.reply.cancelled()
    with pytest.raises(queue.Empty):
        server.calls.get_nowait()
