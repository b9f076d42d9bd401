"""Agents: programs that talk to the policy as to any language model, and say at the end what the sample was worth.

    async def agent(prompt: Prompt, endpoint: Endpoint, **arguments) -> float

`environment.name` names the function; it is called once a sample, and may be a plain function too, which then runs in a thread
of its own. What it asks of `endpoint` is sampled from the policy and learned from. `program` is the agent for everything else:
it runs a command. Agents run beside the sampler with its rights; code that nobody trusts does not belong here.

A client that loses patience and asks again begins another conversation, so clients should wait and not repeat: `max_retries=0`
and a long `timeout` with OpenAI's.
"""

import asyncio
import inspect
import json
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rayrlhf.data.records import Prompt

Agent = Callable[..., Any]
"""See the module's docstring; with its `arguments` bound already."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an agent finds the policy.

    Attributes:
        base_url: of an OpenAI-compatible API, on this machine.
        api_key: the session's bearer token; no two samples share one, and it ends with the agent.
        model: name to ask for.
        seed: differs from sample to sample, for what the agent draws.
    """

    base_url: str
    api_key: str
    model: str
    seed: int


async def run_agent(agent: Agent, prompt: Prompt, endpoint: Endpoint) -> Any:
    """Call an agent, a plain function in a daemon thread, which nobody can end: it is left behind when this is cancelled.

    Raises:
        RuntimeError: it raised something that would end the loop as well.
        Exception: whatever else it raised.
    """
    if not inspect.iscoroutinefunction(getattr(agent, "func", agent)):
        return await _in_thread(agent, prompt, endpoint)
    try:
        return await agent(prompt, endpoint)
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"the agent ended by {error!r}") from error


async def _in_thread(agent: Agent, prompt: Prompt, endpoint: Endpoint) -> Any:
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def settle(how: Callable[[Any], None], value: object) -> None:
        if not result.done():
            how(value)

    def work() -> None:
        try:
            said = agent(prompt, endpoint)
        except (SystemExit, KeyboardInterrupt, StopIteration) as error:
            loop.call_soon_threadsafe(settle, result.set_exception, RuntimeError(f"the agent ended by {error!r}"))
        except Exception as error:  # noqa: BLE001 - it is raised again where the agent is waited for
            loop.call_soon_threadsafe(settle, result.set_exception, error)
        else:
            loop.call_soon_threadsafe(settle, result.set_result, said)

    threading.Thread(target=work, name="agent", daemon=True).start()
    return await result


async def program(prompt: Prompt, endpoint: Endpoint, command: Sequence[str]) -> float:
    """Run a command as the agent of a sample; the last line that it prints is the reward.

    It finds `OPENAI_BASE_URL`, `OPENAI_API_KEY` and `OPENAI_MODEL` in its environment, where OpenAI's clients look for them,
    and on its standard input one line of JSON: `prompt`, `columns` of the dataset's row, and `seed`. It and all that it started
    end with the sample.

    Args:
        prompt: of the sample.
        endpoint: the policy.
        command: program and arguments.

    Raises:
        RuntimeError: it ended with another exit code than 0, or without a number in its last line.
    """
    given = {
        "OPENAI_BASE_URL": endpoint.base_url,
        "OPENAI_API_KEY": endpoint.api_key,
        "OPENAI_MODEL": endpoint.model,
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"])),
    }
    task = {"prompt": prompt.text, "columns": prompt.columns, "seed": endpoint.seed}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, env=os.environ | given, start_new_session=True
    )
    try:
        output, complaints = await process.communicate(json.dumps(task, default=str).encode() + b"\n")
    finally:
        with suppress(ProcessLookupError):  # nothing of the group is left
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    lines = output.decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if process.returncode != 0:
        said = " ".join(complaints.decode("utf-8", "replace").split())[-300:]
        raise RuntimeError(f"{command[0]} ended with exit code {process.returncode}: {said}")
    try:
        return float(last)
    except ValueError as error:
        raise RuntimeError(f"{command[0]} printed {last[:100]!r} as its last line, expected the reward") from error


class AgentLoop:
    """Runs agents in one event loop, in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="agents", daemon=True).start()

    def start(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Start an agent; returns what it will say."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def is_blocked(self, seconds: float) -> bool:
        """Whether some agent's coroutine blocks the others, where it should await: the loop does not answer in so long."""
        try:
            self.start(asyncio.sleep(0)).result(seconds)
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        """Give agents that were cancelled a moment to clean up, and stop."""

        async def rest() -> None:
            running = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            await asyncio.wait(running, timeout=1.0) if running else None

        with suppress(TimeoutError):
            self.start(rest()).result(2.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
