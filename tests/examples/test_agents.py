"""The example of an agent with tools: its chat template and vLLM's parser, and what PPO teaches (by hand: `-m nightly -s`)."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from rayrlhf.config.pipelines import ChainConfig
from rayrlhf.environments.players.agent_session import Texts
from rayrlhf.models.tiny import byte_tokenizer
from rayrlhf.pipelines.chain.run_chain import run_chain
from tests.environments.players.test_agent_tools import play, trained_once
from tests.examples.chains import seeded_chain

pytestmark = pytest.mark.slow
pytest.importorskip("vllm")
pytest.importorskip("openai")
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/agents"


def chain_of(seed: int, root: Path) -> ChainConfig:
    """The chain with other start weights, other conversations and other draws, and the same held-out problems."""
    return seeded_chain(EXAMPLE / "calculator.yaml", seed, root, "builtin:tiny?", "builtin:calculations?calls")


def test_the_agent_of_the_example_is_paid_for_a_sum_that_its_tool_computed(monkeypatch):
    solve = runpy.run_path(str(EXAMPLE / "calculator.py"))["solve"]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (EXAMPLE / "tools.jinja").read_text()
    example = Texts.of(tokenizer, "pythonic")

    async def agent(prompt, endpoint):
        return await solve(replace(prompt, text="41+25=", columns={"answer": "66"}), endpoint)

    call = '[add(s="41+25")]'
    said = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in (call, "66")]
    rollout, scripted = play(monkeypatch, agent, said, example)
    trained_once(rollout, scripted, said)
    assert (rollout.rewards.sum(), rollout.extra_segments) == (1.0, ())
    assert "t\n66<|im_end|>" in tokenizer.decode(rollout.response_ids)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_success_rises_by_at_least_three_tenths(tmp_path, monkeypatch, seed, capsys):
    monkeypatch.chdir(ROOT)
    reports = run_chain(chain_of(seed, tmp_path), ROOT)
    before, after = (
        json.loads((tmp_path / f"agents-{seed}" / stage / "evaluation.json").read_text())["score"]["mean"]
        for stage in ("after-sft", "after-ppo")
    )
    with capsys.disabled():
        for report in reports:
            print(f"\nseed {seed}, {report.name} ({report.seconds:.0f} s): {report.headline}", end="")
    assert after >= before + 0.3
