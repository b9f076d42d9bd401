"""Constrained completions: what is refused, what is sampled, and what of it is trained."""

import json

import numpy as np
import pytest
import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.environments.endpoint.call import Refusal
from rayrlhf.environments.endpoint.chat import read_chat
from rayrlhf.environments.endpoint.messages import read_messages
from rayrlhf.environments.endpoint.responses import read_response
from rayrlhf.environments.players.factory import build_player
from tests.engines.rollout_cases import TINY, load_network
from tests.environments import agents
from tests.environments.players.test_agent_player import request, section
from tests.environments.players.test_agent_tools import SCHEMA, TOOL, USER, play, post, spoken
from tests.environments.sample_players import Scripted

FORM = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
CHAT_FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": FORM}}
ADD = {"name": "add", "description": "sum", "input_schema": SCHEMA}


@pytest.mark.parametrize(
    ("read", "body", "forced", "form"),
    [
        (read_chat, {"tools": [TOOL], "tool_choice": "required"}, "", None),
        (read_chat, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}}, "add", None),
        (read_chat, {"response_format": {"type": "json_object"}}, None, {"type": "object"}),
        (read_chat, {"response_format": CHAT_FORM}, None, FORM),
        (read_messages, {"tools": [ADD], "tool_choice": {"type": "any"}}, "", None),
        (read_messages, {"tools": [ADD], "tool_choice": {"type": "tool", "name": "add"}}, "add", None),
        (read_messages, {"output_config": {"format": {"type": "json_schema", "schema": FORM}}}, None, FORM),
        (read_response, {"tools": [{"type": "function", "name": "add"}], "tool_choice": "required"}, "", None),
        (read_response, {"text": {"format": {"type": "json_schema", "name": "answer", "schema": FORM}}}, None, FORM),
    ],
)
def test_each_dialect_reads_its_form_of_a_constraint(read, body, forced, form):
    call = read("token", {"messages": USER, "input": "x"} | body)
    assert (call.forced, call.form, call.constrained, call.use_tools) == (forced, form, True, True)


@pytest.mark.parametrize(
    ("read", "body", "code"),
    [
        (read_chat, {"tool_choice": "required"}, "invalid_tool_choice"),
        (read_chat, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "ad"}}}, "invalid_tool_choice"),
        (read_chat, {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "name": "add"}}, "invalid_tool_choice"),
        (read_chat, {"tools": [TOOL], "tool_choice": 3}, "invalid_tool_choice"),
        (read_chat, {"response_format": {"type": "xml"}}, "invalid_response_format"),
        (read_chat, {"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "invalid_response_format"),
        (read_chat, {"response_format": "json_object"}, "invalid_response_format"),
        (read_messages, {"output_config": 3}, "invalid_output_config"),
        (read_messages, {"tool_choice": {"type": "any"}}, "invalid_tool_choice"),
        (read_response, {"text": {"format": {"type": "json_schema"}}}, "invalid_text.format"),
    ],
)
def test_a_constraint_of_another_form_is_refused_by_name(read, body, code):
    with pytest.raises(Refusal) as refused:
        read("token", {"messages": USER, "input": "x"} | body)
    assert (refused.value.status, refused.value.code) == (400, code)


@pytest.mark.parametrize("body", [{"response_format": CHAT_FORM}, {"tools": [TOOL], "tool_choice": "required"}])
def test_an_engine_without_constrained_decoding_refuses_with_one_line(monkeypatch, body):
    def agent(prompt, endpoint):
        refused = post(endpoint, "chat/completions", {"messages": USER} | body)
        assert refused.status_code == 400
        assert "needs constrained decoding, which rollout.backend vllm has" in refused.json()["error"]["message"]
        post(endpoint, "chat/completions", {"messages": USER}).raise_for_status()
        return 1.0

    play(monkeypatch, agent, [spoken("a")])


def test_the_tokens_of_a_constrained_completion_are_named(monkeypatch):
    monkeypatch.setattr(Scripted, "constrains", True, raising=False)

    def agent(prompt, endpoint):
        messages = list(USER)
        for more in ({}, {"response_format": CHAT_FORM}, {}):
            said = post(endpoint, "chat/completions", {"messages": messages} | more).json()["choices"][0]["message"]
            messages += [said, {"role": "user", "content": "y"}]
        return 1.0

    said = [spoken("ab"), spoken('{"a": true}'), spoken("c")]
    rollout, scripted = play(monkeypatch, agent, said)
    assert [one.constraint for one, _ in scripted.asked] == [None, {"json": FORM}, None]
    assert rollout.response_ids[rollout.constrained].tolist() == said[1]
    assert rollout.action_mask[rollout.constrained].all()


def loops(prompt, endpoint):
    """Every kind of a constraint, and a schema without a grammar."""
    answers = [
        post(endpoint, "chat/completions", {"messages": USER, "max_tokens": 60} | body).json()
        for body in (
            {"response_format": CHAT_FORM},
            {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
        )
    ]
    SAID.append(answers)
    return 1.0


SAID = []


@pytest.mark.slow
def test_vllm_samples_what_the_constraint_allows_and_its_logprobs_are_those_of_that_distribution(monkeypatch):
    pytest.importorskip("vllm")
    import xgrammar

    monkeypatch.setattr(agents, "turns", loops)
    path = TINY.replace("context=96", "context=512") + "true"
    model = ModelSection.model_validate({"path": path, "dtype": "float32", "chat_template": "tests/environments/tools.jinja"})
    rollout = RolloutSection.model_validate({"backend": "vllm", "max_concurrent": 8, "memory_gib": 0.0625})
    engine = build_player(RolloutSpec(model, rollout, seed=0, environment=section("turns", max_turns=8)))
    engine.submit([request(0, sample) for sample in range(3)], temperature=0.7, max_new_tokens=400)
    played = engine.poll(3)
    tokenizer = engine._texts.tokenizer
    engine.close()
    assert [one.failure for one in played] == [""] * 3
    for form, required, named, refused in SAID:
        assert refused["error"]["code"] == "invalid_response_format"
        assert "vLLM cannot constrain this" in refused["error"]["message"]
        for answer in (required, named):
            for call in answer["choices"][0]["message"].get("tool_calls", ()):
                assert call["function"]["name"] == "add"
                assert isinstance(json.loads(call["function"]["arguments"]), dict)
        if form["choices"][0]["finish_reason"] == "stop":
            assert isinstance(json.loads(form["choices"][0]["message"]["content"])["a"], bool)
    assert any(form["choices"][0]["finish_reason"] == "stop" for form, *_ in SAID)
    network = load_network(tie=True)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(FORM))
    for one in played:
        tokens, start = torch.from_numpy(one.sequence().token_ids).long(), len(one.prompt_ids)
        with torch.no_grad():
            logits = network(input_ids=tokens[None]).logits[0, start - 1 : -1] / 0.7
        free = torch.log_softmax(logits, -1).gather(-1, tokens[start:, None])[:, 0].numpy()
        matcher = xgrammar.GrammarMatcher(compiled)
        mask = xgrammar.allocate_token_bitmask(len(logits), len(tokenizer))
        for at, token in enumerate(tokens[start:].tolist()):
            matcher.fill_next_token_bitmask(mask, at)
            assert matcher.accept_token(token)
        xgrammar.apply_token_bitmask_inplace(logits, mask)
        allowed = torch.log_softmax(logits, -1).gather(-1, tokens[start:, None])[:, 0].numpy()
        assert one.constrained.all()
        assert np.abs(allowed - one.logprobs).max() < 1e-4
        assert (free < one.logprobs - 0.5).mean() > 0.5
