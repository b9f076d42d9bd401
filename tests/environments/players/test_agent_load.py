"""The endpoint under load: 512 sessions at a time, and the time that it takes for a request."""

import asyncio
import subprocess
import sys
import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from rayrlhf.environments.players.agent_player import AgentPlayer
from rayrlhf.environments.players.agent_session import Texts
from rayrlhf.environments.registry import find_agent
from tests.environments import agents
from tests.environments.players.test_agent_player import request, section
from tests.environments.players.test_agent_tools import TOKENIZER, spoken
from tests.environments.sample_players import Scripted

SESSIONS, TURNS = 512, 4
MOST_MILLISECONDS = 10.0
"""Bound of a request's CPU time: 1.8 to 2.1 on quiet cores, 4.3 on loaded ones, 19 with a thread a session."""
CALL = spoken('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>')
LAST = spoken("10")


class Sampler(Scripted):
    """Calls the tool in all turns but the last of a session, and takes its own time."""

    def __init__(self):
        super().__init__([], TOKENIZER)
        self.seen, self.seconds = {}, 0.0

    def poll(self, minimum, seconds=None):
        start = time.thread_time()
        for one, _ in self.queued:
            self.seen[one.key] = self.seen.get(one.key, 0) + 1
            self.turns.append(LAST if self.seen[one.key] == TURNS else CALL)
        turns = super().poll(minimum, seconds)
        self.seconds += time.thread_time() - start
        return turns


@pytest.mark.slow
def test_512_sessions_of_four_turns_end_without_an_error_within_their_time(monkeypatch):
    pytest.importorskip("vllm")
    waiting, command = {}, [sys.executable, "-m", "tests.environments.load_client"]
    clients = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    async def agent(prompt, endpoint):
        loop = asyncio.get_running_loop()
        waiting[endpoint.api_key] = loop, loop.create_future()
        clients.stdin.write(f"{endpoint.base_url} {endpoint.api_key}\n")
        return await waiting[endpoint.api_key][1]

    def read():
        for line in clients.stdout:
            key, said = line.split()
            loop, ended = waiting[key]
            loop.call_soon_threadsafe(ended.set_result, float(said))

    threading.Thread(target=read, daemon=True).start()
    monkeypatch.setattr(agents, "turns", agent)
    limits, sampler = section("turns", timeout_seconds=300), Sampler()
    player = AgentPlayer(sampler, find_agent(limits), limits, Texts.of(TOKENIZER))
    try:
        player.submit(
            [request(SESSIONS)], temperature=1.0, max_new_tokens=5000
        )  # Libraries are imported by the first requests.
        player.poll(1)
        sampler.asked.clear()
        start, sampler.seconds = time.process_time(), 0.0
        player.submit([request(prompt) for prompt in range(SESSIONS)], temperature=1.0, max_new_tokens=5000)
        rollouts = player.poll(SESSIONS)
        spent = time.process_time() - start - sampler.seconds
    finally:
        player.close()
        clients.kill()
        clients.wait()
    assert [one.failure for one in rollouts] == [""] * SESSIONS
    assert [float(one.rewards.sum()) for one in rollouts] == [10.0] * SESSIONS
    said = np.array([*CALL * (TURNS - 1), *LAST])
    assert all((one.response_ids[one.action_mask] == said).all() and not one.extra_segments for one in rollouts)
    by_key = {}
    for asked, _ in sampler.asked:
        by_key.setdefault(asked.key, []).append(asked.prompt_ids.tolist())
    for one, two in (pair for asked in by_key.values() for pair in pairwise(asked)):
        assert two[: len(one) + len(CALL)] == one + CALL
    milliseconds = 1000 * spent / (SESSIONS * TURNS)
    print(f"endpoint: {milliseconds:.2f} ms of CPU a request")
    assert milliseconds < MOST_MILLISECONDS
