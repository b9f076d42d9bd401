"""Agents: functions that sample from the policy over HTTP and return a reward.

    async def agent(prompt: Prompt, endpoint: Endpoint, **arguments) -> float

`environment.name` names the function. It is called once per sample. A plain function is allowed and runs in its own thread.
Completions requested from `endpoint` are sampled from the policy and trained on. The agent `program` runs a command. Agents run
in the rollout actor's process with its permissions; do not run untrusted code here.

The returned number is the reward of every branch. To reward parts of a sample separately, name them: a request with
`metadata: {"path": "planner"}` belongs to that path, and the agent returns {path: reward} or calls `endpoint.reward`. Requests
without a name have the path "".

A completion whose client has disconnected is left out of the sample. Clients should wait and not retry: with OpenAI's,
`max_retries=0` and a long `timeout`.
"""

import asyncio
import inspect
import json
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rayrlhf.data.records import Prompt

CLOSE_SECONDS = 3.0
"""Maximum wait for agents and tools to clean up."""
Agent = Callable[..., Any]
"""See the module's docstring; its `arguments` are already bound."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address of the policy for an agent.

    Attributes:
        base_url: URL of an OpenAI-compatible API on this machine, ending in `/v1`. Anthropic's clients expect it without that.
        api_key: bearer token of the session; unique per sample and valid until the agent ends.
        model: model name for requests.
        seed: seed for the agent's random numbers; differs from sample to sample.
        rewards: rewards so far by path.
    """

    base_url: str
    api_key: str
    model: str
    seed: int
    rewards: dict[str, float] = field(default_factory=dict, compare=False)

    def reward(self, reward: float, path: str = "") -> None:
        """Add to the reward of a path.

        The returned number is then not paid to it.
        """
        self.rewards[path] = self.rewards.get(path, 0.0) + reward


async def run_agent(agent: Agent, prompt: Prompt, endpoint: Endpoint) -> Any:
    """Call an agent; a plain function runs in a daemon thread.

    The thread cannot be stopped: it is abandoned when this coroutine is cancelled.

    Raises:
        RuntimeError: the agent raised an exception that would also end the event loop.
        Exception: any other exception of the agent.
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

    def resolve(setter: Callable[[Any], None], value: object) -> None:
        if not result.done():
            setter(value)

    def work() -> None:
        try:
            reward = agent(prompt, endpoint)
        except (SystemExit, KeyboardInterrupt, StopIteration) as error:
            loop.call_soon_threadsafe(resolve, result.set_exception, RuntimeError(f"the agent ended by {error!r}"))
        except Exception as error:  # noqa: BLE001 - raised again by the awaiting coroutine
            loop.call_soon_threadsafe(resolve, result.set_exception, error)
        else:
            loop.call_soon_threadsafe(resolve, result.set_result, reward)

    threading.Thread(target=work, name="agent", daemon=True).start()
    return await result


async def program(prompt: Prompt, endpoint: Endpoint, command: Sequence[str]) -> float | Mapping[str, float]:
    """Run a command as an agent; its last printed line is the reward.

    That is a number, or a JSON object {path: reward}.

    Its environment has `OPENAI_BASE_URL`, `OPENAI_API_KEY` and `OPENAI_MODEL`, which OpenAI's clients read, and the same for
    Anthropic's. Its standard input has one line of JSON: `prompt`, `columns` of the dataset's row, and `seed`. The process and
    its children are killed at the end of the sample.

    Raises:
        RuntimeError: the exit code is not 0, or the last line is neither.
    """
    variables = {
        "OPENAI_BASE_URL": endpoint.base_url,
        "OPENAI_API_KEY": endpoint.api_key,
        "OPENAI_MODEL": endpoint.model,
        "ANTHROPIC_BASE_URL": endpoint.base_url.removesuffix("/v1"),
        "ANTHROPIC_API_KEY": endpoint.api_key,
        "ANTHROPIC_MODEL": endpoint.model,
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"])),
    }
    task = {"prompt": prompt.text, "columns": prompt.columns, "seed": endpoint.seed}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, env=os.environ | variables, start_new_session=True
    )
    try:
        output, errors = await process.communicate(json.dumps(task, default=str).encode() + b"\n")
    finally:
        with suppress(ProcessLookupError):  # the whole group has ended
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    lines = output.decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if process.returncode != 0:
        text = " ".join(errors.decode("utf-8", "replace").split())[-300:]
        raise RuntimeError(f"{command[0]} ended with exit code {process.returncode}: {text}")
    try:
        rewards = json.loads(last) if last.startswith("{") else float(last)
    except ValueError as error:
        raise RuntimeError(f"{command[0]} printed {last[:100]!r} as its last line, expected the reward") from error
    return rewards


class AgentLoop:
    """Event loop in a thread that runs agents."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="agents", daemon=True).start()

    def start(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Start an agent; returns the future of its reward."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def is_blocked(self, seconds: float) -> bool:
        """Return True if an agent blocks the loop: it does not respond within `seconds`."""
        try:
            self.start(asyncio.sleep(0)).result(seconds)
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        """Stop the loop after a moment for cancelled agents to clean up."""

        async def wait_for_agents() -> None:
            running = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in running:  # those of tools' servers run on until here
                task.cancel()
            await asyncio.wait(running, timeout=CLOSE_SECONDS) if running else None

        with suppress(TimeoutError):
            self.start(wait_for_agents()).result(CLOSE_SECONDS + 1.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
