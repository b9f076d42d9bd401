"""Requests that the endpoint refuses, notes or reads in each dialect, and clients that leave or stall."""

import logging
import socket
import sys
import time

import pytest

from rayrlhf.environments.chat_tokens import ChatTokens, same_json, same_messages
from rayrlhf.environments.endpoint import fields as shared_fields
from rayrlhf.environments.endpoint import output_parser, server
from rayrlhf.environments.endpoint.call import Call, Refusal
from rayrlhf.environments.endpoint.chat import read_chat
from rayrlhf.environments.endpoint.messages import read_messages
from rayrlhf.environments.endpoint.output_parser import OutputParser
from rayrlhf.environments.endpoint.responses import read_response
from rayrlhf.errors import UserError
from tests.environments.chat_families import families, tokenizer_of
from tests.environments.players.test_agent_player import END, engine_of, ids, request
from tests.environments.players.test_agent_player import TOKENIZER as BYTES
from tests.environments.players.test_agent_tools import CHAT, SCHEMA, TOKENIZER, TOOL, USER


@pytest.fixture(autouse=True)
def notices(monkeypatch, caplog):
    """The log, with no field noted yet."""
    monkeypatch.setattr(shared_fields, "_noticed", set())
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize(
    ("read", "body", "field"),
    [
        (read_chat, {"tools": [TOOL | {"function": TOOL["function"] | {"description": 5}}]}, "description"),
        (read_chat, {"tools": [TOOL | {"function": TOOL["function"] | {"strict": "yes"}}]}, "strict"),
        (read_chat, {"tools": [TOOL | {"function": TOOL["function"] | {"parameters": 0}}]}, "parameters"),
        (read_messages, {"tools": [{"name": "add", "description": 0, "input_schema": SCHEMA}]}, "description"),
        (read_response, {"tools": [{"type": "function", "name": "add", "description": []}]}, "description"),
    ],
)
def test_a_tool_with_a_field_of_another_type_is_refused_by_the_fields_name(read, body, field):
    with pytest.raises(Refusal, match=f"tool 1: {field}: expected") as refused:
        read("token", {"messages": USER, "input": "x"} | body)
    assert (refused.value.status, refused.value.code) == (400, "invalid_tools")


def test_the_first_fault_of_a_parser_is_logged_and_the_answer_is_text(monkeypatch, notices):
    tokenizer, _ = tokenizer_of("phi3", families()["phi3"])
    parser = OutputParser(tokenizer, ChatTokens(tokenizer), "auto", "none")
    parser.tools = "hermes"

    def broken(*arguments):
        raise KeyError("properties")

    monkeypatch.setattr(output_parser, "_run", broken)
    call = Call("", USER, tools=[TOOL])
    assert [parser.parse([70], "said", call, "").text for _ in range(2)] == ["said", "said"]
    (record,) = notices.records
    assert "hermes fails on a completion" in record.getMessage()
    assert record.exc_info[0] is KeyError


def test_a_completion_without_calls_and_reasoning_needs_no_parser(monkeypatch, notices):
    tokenizer, _ = tokenizer_of("phi3", families()["phi3"])
    parser = OutputParser(tokenizer, ChatTokens(tokenizer), "auto", "none")
    parser.reasoning = "deepseek_r1"
    monkeypatch.setattr(output_parser, "_run", None)
    assert parser.parse([70], "said", Call("", USER), "").text == "said"
    assert notices.records == []


def test_a_vllm_that_cannot_be_imported_leaves_agents_without_tools_in_one_line(monkeypatch, tmp_path, notices):
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise ImportError('libcudart.so.13: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    parser = OutputParser(TOKENIZER, CHAT, "auto", "auto")
    assert (parser.tools, parser.reasoning) == (None, None)
    (record,) = notices.records
    assert "parsed by vLLM, which cannot be imported: ImportError: libcudart.so.13" in record.getMessage()
    with pytest.raises(UserError, match=r"rollout.tool_parser.*which cannot be imported: ImportError"):
        OutputParser(TOKENIZER, CHAT, "hermes", "auto")


@pytest.mark.parametrize(
    ("read", "body", "named"),
    [
        (
            read_chat,
            {"temperature": 0, "top_p": 0.0, "include_reasoning": False},
            {"temperature", "top_p", "include_reasoning"},
        ),
        (read_chat, {"echo": False, "top_logprobs": 0, "logit_bias": {}, "temperature": None}, set()),
        (read_messages, {"thinking": {"type": "enabled", "budget_tokens": 9}, "top_k": 0}, {"thinking", "top_k"}),
        (
            read_response,
            {"include": ["reasoning.encrypted_content"], "truncation": "auto", "text": {"verbosity": "low"}},
            {"include", "truncation", "text.verbosity"},
        ),
    ],
)
def test_settings_without_effect_are_named_once_also_with_zero_or_false(read, body, named, notices):
    for _ in range(2):
        read("token", ({"input": "x"} if read is read_response else {"messages": USER}) | body)
    assert sorted(record.args[0] for record in notices.records) == sorted(named)


USE = {"type": "tool_use", "id": "1", "name": "add", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "no such tool"}


@pytest.mark.parametrize(
    ("read", "message", "reason"),
    [
        (read_messages, {"role": "user", "content": [USE]}, "tool_use belongs to the assistant, found one of the user"),
        (read_messages, {"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}, "thinking belongs to the assist"),
        (read_messages, {"role": "assistant", "content": [RESULT]}, "tool_result belongs to the user"),
        (read_messages, {"role": "system", "content": [RESULT]}, "tool_result belongs to the user"),
        (read_chat, {"role": "assistant", "refusal": "I cannot"}, "refusal is not supported in a message"),
        (read_chat, {"role": "assistant", "content": "", "audio": {"id": "audio_1"}}, "audio is not supported in a message"),
        (read_chat, {"role": "user", "content": "see", "images": ["a.png"]}, "images is not supported in a message"),
        (read_chat, {"role": "assistant", "function_call": {"name": "add"}}, "function_call .* expected tool_calls"),
    ],
)
def test_parts_of_messages_that_cannot_be_kept_are_refused(read, message, reason):
    with pytest.raises(Refusal, match=reason):
        read("token", {"messages": [*USER, message, *USER]})


def test_parts_of_messages_without_effect_are_named_in_the_log(notices):
    answer = {"role": "assistant", "content": "a", "weight": 0, "refusal": None, "audio": None, "annotations": []}
    read_chat("token", {"messages": [*USER, answer, *USER]})
    results = {"role": "user", "content": [RESULT | {"is_error": True}]}
    read_messages("token", {"messages": [*USER, {"role": "assistant", "content": [USE]}, results]})
    assert [record.args[0] for record in notices.records] == ["messages.weight", "tool_result.is_error"]


def test_neighboring_reasoning_items_are_one_reasoning():
    thoughts = [
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]} for text in ("I ", "add")
    ]
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "3"}]}
    call = read_response("token", {"input": [*USER, *thoughts, said, *USER]})
    assert call.messages[1] == {"role": "assistant", "content": "3", "reasoning_content": "I add"}


def test_none_of_several_completions_is_kept_if_the_client_leaves_after_the_first():
    engine, scripted = engine_of([[*ids("a"), END], [*ids("b"), END], [*ids("c"), END]], "sleeping")
    engine.submit([request()], temperature=1.0, max_new_tokens=90)
    (session,) = engine._sessions.values()
    left, next_one = Call(session.token, USER, count=2), Call(session.token, USER)
    engine._sample(left)
    first, second = scripted.poll(2)
    engine._completed(first)
    left.reply.cancel()
    engine._completed(second)
    engine._sample(next_one)
    engine._completed(*scripted.poll(1))
    rollout = session.rollout({"": 1.0}, BYTES)
    engine.close()
    assert [one.text for one in next_one.reply.result()] == ["c"]
    assert (rollout.response_ids.tolist(), rollout.extra_segments) == ([*ids("c"), END], ())


def test_a_client_that_leaves_in_lockstep_has_the_whole_time_for_its_next_request():
    engine, _ = engine_of([], "sleeping", lockstep=True)
    engine.submit([request()], temperature=1.0, max_new_tokens=90)
    (session,) = engine._sessions.values()
    for serve in (engine._sample, lambda call: engine._server.calls.put(call) or engine.poll(1, 0.2)):
        call = Call(session.token, USER)
        call.reply.cancel()
        session.since = time.monotonic() - 100  # environment.timeout_seconds is 20
        serve(call)
        assert time.monotonic() - session.since < 10
        assert (session.overdue, engine._waiting_calls) == ("", [])
    engine.close()


def test_a_call_that_differs_in_the_type_of_a_number_is_another_conversation():
    def said(value):
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": value}}}
        return [*USER, {"role": "assistant", "content": "", "tool_calls": [call]}]

    def result(content):
        return [*USER, {"role": "tool", "content": content}]

    assert same_messages(said(1), said(1), "") == 2
    assert same_messages(said(1), said(True), "") == same_messages(said(1), said(1.0), "") == 0
    assert same_messages(result('{"a":1,"b":2}'), result('{"b": 2, "a": 1}'), "") == 1
    assert same_messages(result('{"a":1}'), result('{"a": true}'), "") == 0
    assert same_messages(result("[" * 100_000), result("x"), "") == 0
    assert same_json({"a": {"b": 1}, "c": 2}, {"c": 2, "a": {"b": 1}})
    assert not same_json({"enable_thinking": True}, {"enable_thinking": 1})


@pytest.mark.parametrize(("stranger", "status"), [(True, "401"), (False, "408")])
def test_a_stranger_is_refused_before_its_body_and_a_stalled_body_after_a_time(monkeypatch, stranger, status):
    monkeypatch.setattr(server, "BODY_SECONDS", 0.3, raising=False)
    chat = server.ChatServer()
    token = "another" if stranger else chat.admit()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 99\r\n\r\n{{"
    try:
        with socket.create_connection((server.LOOPBACK, int(chat.url.split(":")[2].removesuffix("/v1"))), timeout=5) as client:
            client.sendall(head.encode())
            assert client.recv(4096).decode().startswith(f"HTTP/1.1 {status} ")
    finally:
        chat.close()
