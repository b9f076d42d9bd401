"""Built-in agents with tools: those of the package, and those of servers of the Model Context Protocol."""

import asyncio
import json
import socket
import subprocess
import sys
import time

import pytest

from rayrlhf.config.rollout import EnvironmentSection
from rayrlhf.environments.players.agent_player import AgentPlayer
from rayrlhf.environments.registry import find_agent
from rayrlhf.environments.tool_use import mcp_servers
from rayrlhf.environments.tool_use.mcp_servers import server_tools
from rayrlhf.environments.tool_use.tool import ToolError, make_tools
from rayrlhf.errors import UserError
from rayrlhf.rewards import sandbox
from tests.environments.players.test_agent_player import request
from tests.environments.players.test_agent_tools import TEXTS, TOKENIZER, spoken, trained_once
from tests.environments.sample_players import Scripted

pytest.importorskip("mcp")
SERVER = {"command": [sys.executable, "-m", "tests.environments.mcp_server"]}


def called(name, **arguments):
    return spoken(f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>')


def play(name, arguments, turns, **keys):
    limits = EnvironmentSection.model_validate({"name": name, "arguments": arguments, "timeout_seconds": 60} | keys)
    scripted = Scripted(turns, TOKENIZER)
    engine = AgentPlayer(scripted, find_agent(limits), limits, TEXTS)
    try:
        engine.submit([request()], temperature=1.0, max_new_tokens=5000)
        (rollout,) = engine.poll(1)
    finally:
        engine.close()
    return rollout, scripted


def observed(rollout):
    """What the policy read between its turns."""
    return TOKENIZER.decode(rollout.response_ids[~rollout.action_mask])


def test_the_policy_reads_the_answers_of_tools_and_the_faults_of_its_calls():
    said = [
        called("calculator", expression="6*7"),
        called("calculator", expression="six"),
        called("calculater", expression="1"),
        spoken('<tool_call>\n{"name": "calculator", "arguments": {"expression": 1}}\n</tool_call>'),
        spoken("ab"),
    ]
    rollout, scripted = play("tools", {"tools": ["calculator"]}, said)
    assert (rollout.failure, float(rollout.rewards.sum())) == ("", 1.0)
    trained_once(rollout, scripted, said)
    parts = (
        "\n42\n",
        "error: not a calculation",
        "error: no tool 'calculater'; expected one of calculator",
        "expected text in",
    )
    assert all(part in observed(rollout) for part in parts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": ["calculater"]}, "did you mean 'calculator'?"),
        ({"tools": [{"name": "search", "paht": "x"}]}, "takes no argument 'paht'; did you mean 'path'?"),
        ({"tools": "calculator"}, "expected a list of names"),
        ({"tools": [3]}, "expected a name or {name, ...}"),
        ({"tools": []}, "expected tools with different names, found []"),
        ({"tools": ["calculator", "calculator"]}, "expected tools with different names"),
        ({"tools": ["calculator"], "answer": "anser"}, "the dataset has no column 'anser'; its columns are: answer"),
        ({"servers": [{"command": ["no-such-program"]}]}, "no-such-program: [Errno 2] No such file"),
        ({"servers": [{"command": [sys.executable, "-c", "import sys; sys.exit('bad day')"]}]}, "Connection closed (bad day)"),
        ({"servers": [{"url": "http://example.com/mcp"}]}, "name others in environment.arguments.allowed_hosts"),
        ({"servers": [{"url": "ftp://localhost/mcp"}]}, "expected http(s) on one of"),
        ({"servers": [{"url": "http://127.0.0.1:9/mcp"}]}, "connection attempts failed"),
        ({"servers": [{"comand": ["x"]}]}, "expected {command: [...], env, cwd} or {url: ...}"),
        ({"servers": [{"command": "python"}]}, "command: expected a list of texts"),
    ],
)
def test_a_mistake_in_the_tools_ends_the_run_with_one_line(arguments, message):
    with pytest.raises(UserError) as caught:
        play("tools", arguments, [])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_python_tool_runs_in_the_sandbox():
    if lacking := sandbox.missing():
        pytest.skip(lacking)
    (python,) = make_tools([{"name": "python", "cpu_seconds": 1, "wall_seconds": 10.0}])

    async def run(code):
        try:
            return await python.call({"code": code})
        except ToolError as error:
            return f"error: {error}"

    async def both():
        return await asyncio.gather(run("print(6 * 7)"), run("print(1)\n1 / 0"), run("open('/etc/passwd')"))

    good, bad, outside = asyncio.run(both())
    assert good == "42"
    assert bad == "error: 1\nZeroDivisionError: division by zero"
    assert "error: " in outside


def test_the_search_tool_finds_rows_of_a_dataset(tmp_path):
    path = tmp_path / "facts.jsonl"
    facts = ["The capital of Peru is Lima.", "Basalt is a rock.", "The capital of Chad is N'Djamena."]
    path.write_text("".join(json.dumps({"text": fact}) + "\n" for fact in facts))
    (search,) = make_tools([{"name": "search", "path": str(path), "results": 1}])
    assert asyncio.run(search.call({"query": "capital of Chad"})) == facts[2]
    assert asyncio.run(search.call({"query": "zebra"})) == "nothing found"
    with pytest.raises(UserError, match="row 1: expected text in 'txet'"):
        make_tools([{"name": "search", "path": str(path), "field": "txet"}])


def test_a_server_over_stdio_is_shared_started_again_when_it_dies_and_ends_with_the_player():
    said = [
        called("add", a=1, b=2),
        called("add", a="x"),
        called("refuse"),
        called("crash"),
        called("add", a=20, b=22),
        spoken("ab"),
    ]
    started = []
    real = mcp_servers.Server

    class Counted(real):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self)

    mcp_servers.Server = Counted
    try:
        rollout, _ = play("mcp", {"servers": [SERVER]}, said, retries=1)
        failed, _ = play("mcp", {"servers": [SERVER]}, [called("crash")], retries=0)
    finally:
        mcp_servers.Server = real
    assert (rollout.failure, float(rollout.rewards.sum())) == ("", 1.0)
    assert "\n42\n" in observed(rollout)
    assert len(started) == 3
    assert "Connection closed in a call of crash (out of luck)" in failed.failure
    assert all(server._task.done() for server in started)


@pytest.mark.slow
def test_a_server_over_http_gives_its_tools():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([*SERVER["command"], str(port)], stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.1)

            async def ask():
                tools = {tool.name: tool for tool in await server_tools([{"url": f"http://localhost:{port}/mcp"}])}
                return await tools["add"].call({"a": 1, "b": 2})

            assert asyncio.run(ask()) == "3"
        finally:
            process.kill()
