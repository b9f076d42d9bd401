"""Real clients of agents, unmodified but for address and key, and vLLM's own parsers."""

import json

import pytest

from rayrlhf.environments.chat_tokens import ChatTokens
from rayrlhf.environments.endpoint.call import Call
from rayrlhf.environments.endpoint.output_parser import OutputParser
from rayrlhf.environments.players.agent_session import Texts
from rayrlhf.errors import UserError
from tests.environments.chat_families import families, tokenizer_of
from tests.environments.players.test_agent_tools import CALLS, SCHEMA, TOKENIZER, TOOL, USER, play, spoken, trained_once

pytestmark = pytest.mark.slow
pytest.importorskip("vllm")

PARSERS = {
    "qwen2_5": ("hermes", None),
    "qwen3": ("hermes", "deepseek_r1"),
    "qwen3_5_think": ("qwen3_xml", "deepseek_r1"),
    "smollm3": ("hermes", "deepseek_r1"),
    "llama3_1": ("llama3_json", None),
    "gemma4": ("gemma4", None),
    "glm4moe": ("glm45", "glm45"),
    "lfm2_v2": ("lfm2", None),
    "mistral": ("mistral", None),
    "phi3": (None, None),
}
"""Tool parser and reasoning parser that fit a family."""
SUM = "3 and 7"


@pytest.fixture(scope="module")
def texts():
    return Texts.of(TOKENIZER)


@pytest.mark.parametrize("name", PARSERS)
def test_the_parsers_are_chosen_by_the_template(name):
    tokenizer, _ = tokenizer_of(name, families()[name])
    parser = OutputParser(tokenizer, ChatTokens(tokenizer), "auto", "auto")
    assert (parser.tools, parser.reasoning) == PARSERS[name]


def test_a_parser_that_does_not_fit_or_does_not_exist_is_one_line_at_the_start():
    chat = ChatTokens(TOKENIZER)
    with pytest.raises(UserError, match=r"rollout.tool_parser: vLLM has no parser 'hermess'; did you mean hermes\?"):
        OutputParser(TOKENIZER, chat, "hermess", "auto")
    with pytest.raises(UserError, match=r"rollout.tool_parser: vLLM's parser 'pythonic' does not fit the chat template"):
        OutputParser(TOKENIZER, chat, "pythonic", "auto")
    with pytest.raises(UserError, match=r"rollout.reasoning_parser: vLLM has no parser 'qwen33'"):
        OutputParser(TOKENIZER, chat, "auto", "qwen33")


def test_the_vocabulary_is_read_once_and_not_for_each_completion(monkeypatch):
    texts, reads = Texts.of(TOKENIZER), []
    monkeypatch.setattr(type(TOKENIZER), "get_vocab", lambda self: reads.append(self) or {})
    parsed = texts.parser.parse([], "", Call("", USER, tools=[TOOL]), "")
    assert (parsed.text, reads) == ("", [])
    thought = spoken("<think>\nI add\n</think>\n\n3")[:-1]
    assert texts.parser.parse(thought, "", Call("", USER), "").reasoning.strip() == "I add"
    assert reads == []


def answers(first, ask):
    """Answer each tool call of a chat completion; returns the second completion."""
    messages = [{"role": "user", "content": "sums?"}, first.choices[0].message.model_dump(exclude_none=True)]
    for call in first.choices[0].message.tool_calls:
        numbers = json.loads(call.function.arguments)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(numbers["a"] + numbers["b"])})
    return ask(messages)


def test_openais_client_uses_tools_and_streams(monkeypatch, texts):
    openai = pytest.importorskip("openai")

    def agent(prompt, endpoint):
        http = openai.DefaultHttpxClient(verify=False)  # plain HTTP; reading the certificates takes seconds
        client = openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0, http_client=http)

        def ask(messages, **fields):
            return client.chat.completions.create(model=endpoint.model, messages=messages, tools=[TOOL], **fields)

        first = ask([{"role": "user", "content": "sums?"}])
        assert first.choices[0].finish_reason == "tool_calls"
        chunks = list(answers(first, lambda messages: ask(messages, stream=True, stream_options={"include_usage": True})))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SUM
        assert chunks[-1].usage.completion_tokens == len(SUM) + 1
        with client.chat.completions.stream(
            model=endpoint.model, messages=[{"role": "user", "content": "y"}], tools=[TOOL]
        ) as stream:
            final = stream.get_final_completion().choices[0].message
        assert [json.loads(call.function.arguments) for call in final.tool_calls] == [{"b": 2, "a": 1}, {"a": 3, "b": 4}]
        with pytest.raises(openai.BadRequestError, match="needs constrained decoding"):
            ask([{"role": "user", "content": "y"}], tool_choice="required")
        response = client.responses.create(model=endpoint.model, input="z")
        assert response.output_text == "z"
        events = list(client.responses.create(model=endpoint.model, input="z", stream=True))
        assert events[-1].response.output_text == "zz"
        return 1.0

    said = [spoken(CALLS), spoken(SUM), spoken(CALLS), spoken("z"), spoken("zz")]
    rollout, scripted = play(monkeypatch, agent, said, texts)
    trained_once(rollout, scripted, said)
    assert rollout.response_ids.tolist()[-len(said[1]) :] == said[1]


def test_openais_asynchronous_client_uses_tools(monkeypatch, texts):
    openai = pytest.importorskip("openai")

    async def agent(prompt, endpoint):
        async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0) as client:

            def ask(messages):
                return client.chat.completions.create(model=endpoint.model, messages=messages, tools=[TOOL])

            first = await ask([{"role": "user", "content": "sums?"}])
            assert (await answers(first, ask)).choices[0].message.content == SUM
        return 1.0

    said = [spoken(CALLS), spoken(SUM)]
    rollout, scripted = play(monkeypatch, agent, said, texts)
    trained_once(rollout, scripted, said)
    assert rollout.extra_segments == ()


def test_anthropics_client_uses_tools_and_streams(monkeypatch, texts):
    anthropic = pytest.importorskip("anthropic")

    def agent(prompt, endpoint):
        address = endpoint.base_url.removesuffix("/v1")
        http = anthropic.DefaultHttpxClient(verify=False)  # plain HTTP; reading the certificates takes seconds
        client = anthropic.Anthropic(base_url=address, api_key=endpoint.api_key, max_retries=0, http_client=http)
        tool = {"name": "add", "description": "sum", "input_schema": SCHEMA}
        messages = [{"role": "user", "content": "sums?"}]
        fields = {"model": endpoint.model, "max_tokens": 900, "tools": [tool]}
        first = client.messages.create(messages=messages, **fields)
        assert first.stop_reason == "tool_use"
        uses = [block for block in first.content if block.type == "tool_use"]
        results = [
            {"type": "tool_result", "tool_use_id": use.id, "content": str(use.input["a"] + use.input["b"])} for use in uses
        ]
        messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
        with client.messages.stream(messages=messages, **fields) as stream:
            assert "".join(stream.text_stream) == SUM
            assert stream.get_final_message().stop_reason == "end_turn"
        with client.messages.stream(messages=[{"role": "user", "content": "y"}], **fields) as stream:
            assert stream.get_final_message().content[-1].input == {"a": 3, "b": 4}
        with pytest.raises(anthropic.BadRequestError, match="needs constrained decoding"):
            client.messages.create(messages=messages, tool_choice={"type": "any"}, **fields)
        with pytest.raises(anthropic.AuthenticationError):
            client.with_options(api_key="another").messages.create(messages=messages, **fields)
        return 1.0

    said = [spoken(CALLS), spoken(SUM), spoken(CALLS)]
    rollout, scripted = play(monkeypatch, agent, said, texts)
    trained_once(rollout, scripted, said)
