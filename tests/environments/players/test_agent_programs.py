"""Clients and environments of other projects, unmodified but for address and key, over HTTP.

They run in the interpreter that RAYRLHF_AGENTS_PYTHON names, whose packages are those of requirements/agents.txt.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from rayrlhf.environments.players.agent_session import Texts
from tests.environments.players import test_agent_tools
from tests.environments.players.test_agent_player import request
from tests.environments.players.test_agent_tools import CALLS, TOKENIZER, play, spoken, trained_once
from tests.environments.sample_players import Scripted
from tests.environments.test_tool_use import called

PYTHON = os.environ.get("RAYRLHF_AGENTS_PYTHON", "")
ROOT = Path(__file__).parents[3]
CLIENTS = ROOT / "tests/environments/clients"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="RAYRLHF_AGENTS_PYTHON names no interpreter; see Clients in docs/guides/agents.md"),
]

TASK = [spoken(CALLS), spoken("3 and 7")]
"""The turns of the task in `tests/environments/clients/task.py`."""


STEPS = [called("add", a=1, b=2), called("final_answer", answer="3 and 7")]
CODE = [spoken("Thought: I add.\n<code>\ntotal = add(a=3, b=7)\n</code>"), spoken("<code>\nfinal_answer(total)\n</code>")]
TURNS = {
    "openai": TASK * 4,
    "anthropic": TASK * 3,
    "litellm": TASK * 4,
    "langgraph": TASK * 4,
    "openai_agents": TASK * 4,
    "smolagents": [*STEPS, *STEPS, *CODE],
}
"""Scripted turns of each client."""


@pytest.fixture(scope="module")
def texts():
    pytest.importorskip("vllm")
    return Texts.of(TOKENIZER)


def require(module):
    """Skip if the interpreter has no such module."""
    look = "import sys; from importlib.util import find_spec; sys.exit(find_spec(sys.argv[1]) is None)"
    if subprocess.run([PYTHON, "-c", look, module]).returncode:
        pytest.skip(f"{PYTHON} has no package {module}; see requirements/agents.txt")


def run(monkeypatch, texts, said, command):
    """The rollout of a program that speaks with scripted turns."""
    monkeypatch.setattr(Scripted, "constrains", True, raising=False)  # smolagents demands a call in each turn
    keys = {"name": "program", "arguments": {"command": command}, "timeout_seconds": 300.0, "max_turns": 40}
    rollout, scripted = play(monkeypatch, None, said, texts, **keys)
    trained_once(rollout, scripted, said)
    return rollout


@pytest.mark.parametrize("name", TURNS)
def test_a_client_runs_a_task_with_tools(monkeypatch, texts, name):
    require("agents" if name == "openai_agents" else name)
    rollout = run(monkeypatch, texts, TURNS[name], [PYTHON, str(CLIENTS / f"{name}_client.py")])
    assert rollout.rewards.sum() == 1.0


def test_a_task_of_verifiers_is_played_with_its_tools_and_rewards(monkeypatch, texts):
    require("verifiers")
    sample = request()
    sample = replace(sample, prompt=replace(sample.prompt, columns={"task": 1}))
    monkeypatch.setattr(test_agent_tools, "request", lambda: sample)
    monkeypatch.setenv("PYTHONPATH", str(CLIENTS))
    program = [PYTHON, str(ROOT / "examples/agents/verifiers_task.py"), "sums_taskset"]
    environment = os.environ | {"OPENAI_MODEL": "policy"}
    listed = subprocess.run([*program, "--rows"], capture_output=True, text=True, check=True, env=environment).stdout
    assert [json.loads(line) for line in listed.splitlines()] == [{"prompt": "no", "task": 0}, {"prompt": "sums?", "task": 1}]
    rollout = run(monkeypatch, texts, TASK, program)
    assert (float(rollout.rewards.sum()), rollout.extra_segments) == (0.5, ())


def test_an_environment_of_gymnasium_is_played_and_closed():
    require("gymnasium")
    command = [PYTHON, str(CLIENTS / "gymnasium_client.py")]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    first, second, closed = json.loads(said.stdout)
    assert first == ["10", ["wrong", 0.0, False], ["right", 1.0, True]]
    assert second == ["8", ["wrong", 0.0, False], ["wrong", 0.0, False], ["wrong", 0.0, True]]
    assert closed == [10, 8]
