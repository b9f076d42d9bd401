"""The example of an agent with a tool, with its own chat template and vLLM's parser."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from rayrlhf.environments.players.agent_session import Texts
from rayrlhf.models.tiny import byte_tokenizer
from tests.environments.players.test_agent_tools import play, trained_once

pytestmark = pytest.mark.slow
pytest.importorskip("vllm")
pytest.importorskip("openai")


def test_the_agent_of_the_example_is_paid_for_a_sum_that_its_tool_computed(monkeypatch):
    root = Path(__file__).parents[2] / "examples/agents"
    solve = runpy.run_path(str(root / "calculator.py"))["solve"]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (root / "tools.jinja").read_text()
    example = Texts.of(tokenizer)

    async def agent(prompt, endpoint):
        return await solve(replace(prompt, text="41+25=", columns={"answer": "66"}), endpoint)

    call = '<tool_call>{"name": "add", "arguments": {"s": "41+25"}}</tool_call>'
    said = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in (call, "66")]
    rollout, scripted = play(monkeypatch, agent, said, example)
    trained_once(rollout, scripted, said)
    assert (rollout.rewards.sum(), rollout.extra_segments) == (1.0, ())
    assert "tool\n66<|im_end|>" in tokenizer.decode(rollout.response_ids)
