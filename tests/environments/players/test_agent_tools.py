"""Agents with tools over HTTP, in each dialect of the endpoint: what clients read, and what is trained."""

import json
import random
import threading

import httpx
import pytest

from rayrlhf.environments.chat_tokens import ChatTokens
from rayrlhf.environments.endpoint.call import Refusal
from rayrlhf.environments.endpoint.chat import read_chat
from rayrlhf.environments.endpoint.messages import read_messages
from rayrlhf.environments.endpoint.output_parser import OutputParser, Parsed
from rayrlhf.environments.endpoint.responses import read_response
from rayrlhf.environments.players.agent_player import AgentPlayer
from rayrlhf.environments.players.agent_session import Texts
from rayrlhf.environments.registry import find_agent
from rayrlhf.errors import UserError
from tests.environments import agents
from tests.environments.chat_families import families, tokenizer_of
from tests.environments.players.test_agent_player import request, section
from tests.environments.sample_players import Scripted

TOKENIZER, STOP = tokenizer_of("qwen3", families()["qwen3"])
END = TOKENIZER.convert_tokens_to_ids(STOP)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "sum", "parameters": SCHEMA}}
USER = [{"role": "user", "content": "x"}]
CALLS = (
    "<think>\nI add\n</think>\n\nLet me see."
    '<tool_call>\n{"name": "add", "arguments": {"b": 2,  "a": 1}}\n</tool_call>'
    '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>'
)


class Hermes:
    """Reads calls in the form of Qwen's template, without vLLM."""

    def check(self, call): ...

    def constraint(self, call, opening):
        return {"json": call.form} if call.constrained else None

    def parse(self, ids, text, call, opening):
        thought, _, said = text.rpartition("</think>")
        said, *parts = said.split("<tool_call>")
        calls = []
        for part in parts if call.tools and call.use_tools else ():
            one = json.loads(part.replace("</tool_call>", ""))
            function = {"name": one["name"], "arguments": json.dumps(one["arguments"])}
            calls.append({"id": None, "type": "function", "function": function})
        said = said.strip()
        for word in call.stop:
            said = said.partition(word)[0]
        return Parsed(said, thought.replace("<think>", "").strip(), calls)


CHAT = ChatTokens(TOKENIZER)
TEXTS = Texts(TOKENIZER, CHAT, Hermes())


def spoken(text):
    """Token ids that no encoder would give: one for each byte."""
    return [3 + byte for byte in text.encode()] + [END]


def play(monkeypatch, agent, turns, texts=TEXTS, **keys):
    """The rollout of an agent, and the scripted sampler."""
    monkeypatch.setattr(agents, "turns", agent)
    limits = section("turns", **keys)
    scripted = Scripted(turns, TOKENIZER)
    engine = AgentPlayer(scripted, find_agent(limits), limits, texts)
    try:
        engine.submit([request()], temperature=1.0, max_new_tokens=5000)
        (rollout,) = engine.poll(1)
    finally:
        engine.close()
    assert rollout.failure == ""
    return rollout, scripted


def post(endpoint, path, body):
    return httpx.post(
        f"{endpoint.base_url}/{path}",
        json={"model": "any"} | body,
        headers={"Authorization": f"Bearer {endpoint.api_key}"},
        timeout=30,
        verify=False,
    )


def trained_once(rollout, scripted, said):
    """Every sampled turn is trained once, after exactly what the sampler was asked with."""
    found = []
    for segment in (rollout, *rollout.extra_segments):
        tokens, start = [*segment.prompt_ids.tolist(), *segment.response_ids.tolist()], len(segment.prompt_ids)
        begin = None
        for at, own in enumerate([*segment.action_mask.tolist(), False]):
            if own and begin is None:
                begin = at
            if not own and begin is not None:
                found.append((tokens[: start + begin], tokens[start + begin : start + at]))
                begin = None
    assert sorted(found) == sorted((one.prompt_ids.tolist(), ids) for (one, _), ids in zip(scripted.asked, said, strict=True))


def test_tool_calls_come_back_in_another_form_and_go_on_from_the_sampled_tokens(monkeypatch):
    read = []

    def agent(prompt, endpoint):
        messages = [{"role": "user", "content": "sums?"}]
        choice = post(endpoint, "chat/completions", {"messages": messages, "tools": [TOOL]}).json()["choices"][0]
        read.append(choice)
        calls = choice["message"]["tool_calls"]
        back = [one | {"function": {"name": "add", "arguments": '{"a":1,"b":2}'}} for one in calls[:1]] + calls[1:]
        messages.append({"role": "assistant", "content": " Let me  see.", "tool_calls": back})
        messages += [{"role": "tool", "tool_call_id": one["id"], "content": "3"} for one in calls]
        read.append(post(endpoint, "chat/completions", {"messages": messages, "tools": [TOOL]}).json()["choices"][0])
        return 1.0

    said = [spoken(CALLS), spoken("3 and 7")]
    rollout, scripted = play(monkeypatch, agent, said)
    first, second = read
    assert (first["finish_reason"], second["finish_reason"]) == ("tool_calls", "stop")
    assert first["message"]["content"] == "Let me see."
    assert first["message"]["reasoning_content"] == "I add"
    assert [json.loads(one["function"]["arguments"]) for one in first["message"]["tool_calls"]] == [
        {"a": 1, "b": 2},
        {"a": 3, "b": 4},
    ]
    assert second["message"]["content"] == "3 and 7"
    assert rollout.extra_segments == ()
    trained_once(rollout, scripted, said)
    between = TOKENIZER.decode(scripted.asked[1][0].prompt_ids[len(scripted.asked[0][0].prompt_ids) + len(said[0]) :])
    response = "\n<tool_response>\n3\n</tool_response>"
    assert between == f"\n<|im_start|>user{response}{response}<|im_end|>\n<|im_start|>assistant\n"


def test_several_choices_are_branches_that_share_a_prompt_and_each_can_go_on(monkeypatch):
    def agent(prompt, endpoint):
        messages = USER
        body = {"messages": messages, "n": 3, "seed": 5, "logprobs": True}
        answer = post(endpoint, "chat/completions", body).json()
        choices = answer["choices"]
        assert [one["index"] for one in choices] == [0, 1, 2]
        assert answer["usage"]["completion_tokens"] == 6
        assert [one["logprob"] for one in choices[0]["logprobs"]["content"]] == [-1.0, -2.0]
        for one in choices[1:]:
            history = [*messages, {"role": "assistant", "content": one["message"]["content"]}, {"role": "user", "content": "y"}]
            post(endpoint, "chat/completions", {"messages": history}).raise_for_status()
        return 0.5

    said = [spoken(letter) for letter in "abcde"]
    rollout, scripted = play(monkeypatch, agent, said)
    trained_once(rollout, scripted, said)
    prompts = [one.prompt_ids.tolist() for one, _ in scripted.asked]
    assert prompts[0] == prompts[1] == prompts[2]
    assert len({one.seed for one, _ in scripted.asked}) == 5
    segments = [rollout, *rollout.extra_segments]
    assert [int(one.action_mask.sum()) for one in segments] == [2, 4, 4]
    assert [float(one.rewards.sum()) for one in segments] == [0.5] * 3


def test_a_retry_and_another_ending_branch_off_with_the_tokens_up_to_there(monkeypatch):
    def agent(prompt, endpoint):
        ask = list(USER)
        for more in ("y", "z", "y"):
            said = "ee"
            if more == "y" and len(ask) == 1:
                said = post(endpoint, "chat/completions", {"messages": ask}).json()["choices"][0]["message"]["content"]
                ask += [{"role": "assistant", "content": said}]
            post(endpoint, "chat/completions", {"messages": [*ask, {"role": "user", "content": more}]}).raise_for_status()
        return 1.0

    said = [spoken("ee"), spoken("1"), spoken("2"), spoken("3")]
    rollout, scripted = play(monkeypatch, agent, said)
    trained_once(rollout, scripted, said)
    prefix = [*scripted.asked[0][0].prompt_ids.tolist(), *said[0]]
    for one, _ in scripted.asked[1:]:
        assert one.prompt_ids.tolist()[: len(prefix)] == prefix
    assert len(rollout.extra_segments) == 2


def test_reasoning_that_the_template_drops_after_a_new_question_makes_a_new_segment_without_it(monkeypatch):
    def agent(prompt, endpoint):
        messages = [{"role": "user", "content": "x"}]
        said = post(endpoint, "chat/completions", {"messages": messages}).json()["choices"][0]["message"]
        assert (said["content"], said["reasoning_content"]) == ("one", "I think")
        messages += [{"role": "assistant", "content": "one"}, {"role": "user", "content": "y"}]
        post(endpoint, "chat/completions", {"messages": messages}).raise_for_status()
        return 1.0

    said = [spoken("<think>\nI think\n</think>\n\none"), spoken("two")]
    rollout, scripted = play(monkeypatch, agent, said)
    trained_once(rollout, scripted, said)
    (other,) = rollout.extra_segments
    expected = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n<|im_start|>user\ny<|im_end|>\n"
    assert TOKENIZER.decode(other.prompt_ids) == expected + "<|im_start|>assistant\n"


def test_reasoning_that_the_template_drops_from_an_earlier_turn_makes_a_new_segment_too(monkeypatch):
    def agent(prompt, endpoint):
        messages = [{"role": "user", "content": "sums?"}]
        for more in ({"role": "tool", "content": "3"}, {"role": "user", "content": "y"}, None):
            body = {"messages": messages, "tools": [TOOL]}
            said = post(endpoint, "chat/completions", body).json()["choices"][0]["message"]
            messages += [said, more]
        return 1.0

    said = [spoken(CALLS), spoken("3 and 7"), spoken("two")]
    rollout, scripted = play(monkeypatch, agent, said)
    trained_once(rollout, scripted, said)
    (other,) = rollout.extra_segments
    assert "I add" in TOKENIZER.decode(scripted.asked[1][0].prompt_ids)
    assert "I add" not in TOKENIZER.decode(other.prompt_ids)
    assert other.response_ids.tolist() == said[2]


def test_a_turn_that_continues_a_conversation_is_rendered_once(monkeypatch):
    def agent(prompt, endpoint):
        messages = list(USER)
        for _ in range(4):
            said = post(endpoint, "chat/completions", {"messages": messages}).json()["choices"][0]["message"]
            messages += [said, {"role": "user", "content": "y"}]
        return 1.0

    play(monkeypatch, agent, [spoken(letter) for letter in "abcd"])  # headers are known from now on
    renders, render = [], ChatTokens._render

    def counted(self, messages, options, *, whole):
        renders.append(len(messages))
        return render(self, messages, options, whole=whole)

    monkeypatch.setattr(ChatTokens, "_render", counted)
    play(monkeypatch, agent, [spoken(letter) for letter in "abcd"])
    assert renders == [1, 3, 5, 7]


def test_stop_strings_of_a_request_reach_the_sampler_and_end_the_text(monkeypatch):
    def agent(prompt, endpoint):
        body = {"messages": USER, "stop": ["Obs"], "max_tokens": 50}
        assert post(endpoint, "chat/completions", body).json()["choices"][0]["message"]["content"] == "go "
        return 1.0

    _, scripted = play(monkeypatch, agent, [spoken("go Obs")])
    ((asked, limit),) = scripted.asked
    assert (asked.stop, limit) == (("Obs",), 50)


def test_a_stream_has_the_parts_of_the_completion_and_its_usage(monkeypatch):
    def agent(prompt, endpoint):
        body = {"messages": USER, "tools": [TOOL], "stream": True}
        answer = post(endpoint, "chat/completions", body | {"stream_options": {"include_usage": True}})
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, last = [line.removeprefix("data: ") for line in answer.text.split("\n") if line]
        assert last == "[DONE]"
        deltas = [choice["delta"] for event in events for choice in json.loads(event)["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see."
        assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "I add"
        parts = [part for delta in deltas for part in delta.get("tool_calls", ())]
        assert "".join(part["function"]["arguments"] for part in parts if part["index"] == 1) == '{"a": 3, "b": 4}'
        assert json.loads(events[-1])["usage"]["completion_tokens"] == len(CALLS.encode()) + 1
        return 1.0

    play(monkeypatch, agent, [spoken(CALLS)])


def test_anthropics_messages_with_tool_use_and_results_continue_the_tokens(monkeypatch):
    tool = {"name": "add", "description": "sum", "input_schema": SCHEMA}

    def agent(prompt, endpoint):
        messages = [{"role": "user", "content": "sums?"}]
        body = {"max_tokens": 400, "system": "Be brief.", "tools": [tool]}
        said = post(endpoint, "messages", body | {"messages": messages}).json()
        assert said["stop_reason"] == "tool_use"
        assert [block["type"] for block in said["content"]] == ["thinking", "text", "tool_use", "tool_use"]
        assert said["content"][2]["input"] == {"a": 1, "b": 2}
        results = [{"type": "tool_result", "tool_use_id": block["id"], "content": "3"} for block in said["content"][2:]]
        messages += [{"role": "assistant", "content": said["content"][1:]}, {"role": "user", "content": results}]
        answer = post(endpoint, "messages", body | {"messages": messages, "stream": True})
        events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n") if line.startswith("data: ")]
        assert [event["type"] for event in events] == [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert events[2]["delta"]["text"] == "done"
        refused = post(endpoint, "messages", body | {"messages": messages, "tool_choice": {"type": "any"}})
        assert (refused.status_code, refused.json()["type"]) == (400, "error")
        return 1.0

    said = [spoken(CALLS), spoken("done")]
    rollout, scripted = play(monkeypatch, agent, said)
    assert rollout.extra_segments == ()
    trained_once(rollout, scripted, said)


def test_responses_with_function_calls_continue_the_tokens(monkeypatch):
    tool = {"type": "function", "name": "add", "parameters": SCHEMA}

    def agent(prompt, endpoint):
        items = [{"role": "user", "content": [{"type": "input_text", "text": "sums?"}]}]
        body = {"instructions": "Be brief.", "tools": [tool]}
        said = post(endpoint, "responses", body | {"input": items}).json()
        assert [item["type"] for item in said["output"]] == ["reasoning", "message", "function_call", "function_call"]
        calls = [item for item in said["output"] if item["type"] == "function_call"]
        items += said["output"]
        items += [{"type": "function_call_output", "call_id": call["call_id"], "output": "3"} for call in calls]
        last = post(endpoint, "responses", body | {"input": items}).json()
        assert last["output"][-1]["content"][0]["text"] == "done"
        assert post(endpoint, "responses", {"input": "x", "previous_response_id": "resp_1"}).status_code == 400
        return 1.0

    said = [spoken(CALLS), spoken("done")]
    rollout, scripted = play(monkeypatch, agent, said)
    assert rollout.extra_segments == ()
    trained_once(rollout, scripted, said)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("messages", {"messages": 3}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": 3}]}]}),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}, {"role": "user", "content": "x"}]},
        ),
        ("messages", {"messages": USER, "tools": [3]}),
        ("messages", {"messages": USER, "system": 3}),
        ("messages", {"messages": USER, "max_tokens": 0}),
        ("responses", {"input": 3}),
        ("responses", {"input": [3]}),
        ("responses", {"input": [{"type": "computer_call"}]}),
        ("responses", {"input": [{"type": "function_call"}, {"role": "user", "content": "x"}]}),
        ("responses", {"input": "x", "tools": [{"type": "web_search"}]}),
        ("responses", {"input": "x", "text": {"format": {"type": "json_object"}}}),
        ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": [{}]}, {"role": "user", "content": "x"}]}),
        ("chat/completions", {"messages": USER, "tools": [TOOL], "tool_choice": "required"}),
    ],
)
def test_bad_requests_are_refused_and_the_sample_goes_on(monkeypatch, path, body):
    def agent(prompt, endpoint):
        assert post(endpoint, path, body).status_code == 400
        post(endpoint, "chat/completions", {"messages": USER}).raise_for_status()
        return 1.0

    rollout, _ = play(monkeypatch, agent, [spoken("a")])
    assert rollout.rewards.sum() == 1.0


TEXT = {"type": "text", "text": "3"}
VALID = {
    read_chat: {
        "messages": [
            *USER,
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "add"}}]},
            *USER,
        ],
        "tools": [TOOL],
        "tool_choice": "auto",
        "n": 2,
        "stop": ["a"],
        "seed": 1,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": False},
        "response_format": {"type": "text"},
        "max_tokens": 5,
    },
    read_messages: {
        "messages": [
            *USER,
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [TEXT]}]},
        ],
        "system": [{"type": "text", "text": "Be brief."}],
        "tools": [{"name": "add", "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "max_tokens": 5,
        "stop_sequences": ["a"],
    },
    read_response: {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "I think"}]},
            {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "3"},
        ],
        "tools": [{"type": "function", "name": "add", "parameters": SCHEMA}],
        "text": {"format": {"type": "text"}},
        "instructions": "Be brief.",
    },
}


def spoiled(rng, value):
    """A copy of JSON with one value replaced by something else."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return rng.choice([None, 3, -1, 0.5, True, "", "x", [], {}, [3], [None], {"a": 1}, ["x", {}]])
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    copy[key] = spoiled(rng, copy[key])
    return copy


@pytest.mark.parametrize("read", VALID)
def test_no_json_is_worse_than_refused(read):
    rng, refused = random.Random(1), 0
    assert read("token", VALID[read]).messages
    for _ in range(3000):
        body = spoiled(rng, VALID[read])
        if not isinstance(body, dict):
            continue
        try:
            call = read("token", body)
            hash(call.stop)
            json.dumps([call.messages, call.options])
        except Refusal as refusal:
            refused += refusal.status == 400
    assert refused > 300


def test_a_template_without_tools_refuses_them_by_name_and_a_parser_named_for_it_stops_the_run(monkeypatch):
    tokenizer, _ = tokenizer_of("phi3", families()["phi3"])
    chat = ChatTokens(tokenizer)
    with pytest.raises(UserError, match=r"rollout.tool_parser 'hermes': the chat template writes no tools"):
        OutputParser(tokenizer, chat, "hermes", "none")

    def agent(prompt, endpoint):
        refused = post(endpoint, "chat/completions", {"messages": USER, "tools": [TOOL]})
        assert "the chat template writes no tools" in refused.json()["error"]["message"]
        post(endpoint, "chat/completions", {"messages": USER}).raise_for_status()
        return 1.0

    play(monkeypatch, agent, [spoken("a")], Texts(tokenizer, chat, OutputParser(tokenizer, chat, "auto", "none")))


def test_each_path_has_a_reward_of_its_own_and_a_request_of_another_path_branches(monkeypatch):
    paths = [{"metadata": {"path": "planner"}}, {"metadata": {"path": "worker"}}, {}, {"metadata": {"path": "planner"}}]

    def agent(prompt, endpoint):
        messages = list(USER)
        for more in paths:
            said = post(endpoint, "chat/completions", {"messages": messages} | more).json()["choices"][0]["message"]
            messages += [said, {"role": "user", "content": "y"}]
        endpoint.reward(0.25, "worker")
        endpoint.reward(0.5, "worker")
        return {"planner": 1.0, "": -1}

    said = [spoken(letter) for letter in "abcd"]
    rollout, scripted = play(monkeypatch, agent, said)
    trained_once(rollout, scripted, said)
    segments = [rollout, *rollout.extra_segments]
    found = [(one.path, float(one.rewards.sum()), float(one.rewards[-1])) for one in segments]
    assert found == [("planner", 1.0, 1.0), ("worker", 0.75, 0.75), ("", -1.0, -1.0), ("planner", 1.0, 1.0)]


def test_a_path_without_a_reward_is_a_mistake_of_the_agent_and_a_number_is_the_reward_of_the_rest(monkeypatch):
    answers = iter([{"a": 1.0}, 0.5])

    def agent(prompt, endpoint):
        for path in ("a", "b"):
            post(endpoint, "messages", {"messages": USER, "metadata": {"path": path}}).raise_for_status()
        endpoint.reward(0.25, "a")
        return next(answers)

    with pytest.raises(UserError, match=r"returned None for path 'b', expected a finite number"):
        play(monkeypatch, agent, [spoken("a"), spoken("b")])
    rollout, _ = play(monkeypatch, agent, [spoken("a"), spoken("b")])
    assert [float(one.rewards.sum()) for one in (rollout, *rollout.extra_segments)] == [0.25, 0.5]


@pytest.mark.parametrize("body", [{"metadata": "a"}, {"metadata": {"path": 3}}])
@pytest.mark.parametrize(("read", "field"), [(read_chat, "messages"), (read_messages, "messages"), (read_response, "input")])
def test_a_path_that_is_no_text_is_refused(read, field, body):
    with pytest.raises(Refusal, match="metadata: expected an object with text in path"):
        read("token", {field: USER} | body)


def test_the_budget_of_sampled_tokens_counts_all_conversations_of_a_sample(monkeypatch):
    def agent(prompt, endpoint):
        for _ in range(2):
            post(endpoint, "chat/completions", {"messages": USER}).raise_for_status()
        assert post(endpoint, "chat/completions", {"messages": USER, "n": 3}).status_code == 400
        post(endpoint, "chat/completions", {"messages": USER, "n": 2}).raise_for_status()
        refused = post(endpoint, "chat/completions", {"messages": USER})
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert "environment.max_sampled_tokens" in refused.json()["error"]["message"]
        return 1.0

    _, scripted = play(monkeypatch, agent, [spoken("aaa"), spoken("b"), [70], [71]], max_sampled_tokens=8)
    assert [limit for _, limit in scripted.asked] == [8, 4, 1, 1]


def test_a_sample_that_spans_a_weight_update_keeps_the_version_of_every_token(monkeypatch):
    heard, updated = threading.Event(), threading.Event()

    def agent(prompt, endpoint):
        for _ in range(2):
            post(endpoint, "chat/completions", {"messages": USER}).raise_for_status()
            heard.set()
            assert updated.wait(10)
        return 1.0

    monkeypatch.setattr(agents, "turns", agent)
    limits, scripted = section("turns"), Scripted([spoken("a"), spoken("b")], TOKENIZER)
    engine = AgentPlayer(scripted, find_agent(limits), limits, TEXTS, continues=True)
    engine.submit([request()], temperature=1.0, max_new_tokens=500)
    while not heard.is_set():
        assert engine.poll(1, 0.01) == []
    engine.begin_weights(6)
    engine.finish_weights()
    updated.set()
    (rollout,) = engine.poll(1)
    engine.close()
    assert [set(one.versions.tolist()) for one in (rollout, *rollout.extra_segments)] == [{5}, {6}]
