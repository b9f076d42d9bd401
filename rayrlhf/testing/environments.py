"""Contract test of environments."""

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rayrlhf.config.rollout import EnvironmentSection
from rayrlhf.data.records import Prompt
from rayrlhf.environments.protocol import Action, Answer, Environment
from rayrlhf.environments.registry import environment_maker
from rayrlhf.errors import UserError
from rayrlhf.plugins import bind_arguments
from rayrlhf.testing.expect import expect

BLOCKED_SECONDS = 1.0
TICK_SECONDS = 0.05


def check_environment(
    environment: type[Environment] | str,
    turns: Sequence[str] = ("a first turn", "42", ""),
    prompt: Prompt | None = None,
    *,
    repeatable: bool = True,
    **arguments: Any,
) -> list[Answer]:
    """Play one sample with given turns of the policy.

    `reset` must return text, `step` an `Answer` with text, a finite reward and a bool, neither may block the event loop for a
    second, and a second object must play the same sample the same way.

    Args:
        environment: the class or its name in a config.
        turns: texts of the policy's turns; play ends early when the environment is done.
        prompt: the sample's prompt, with the dataset columns that the environment reads.
        repeatable: False skips the second game, for environments that depend on the outside world.
        arguments: `arguments` of the config.

    Returns:
        The answers to the turns.

    Raises:
        AssertionError: the environment breaks its contract.
    """
    make = _maker(environment, arguments)
    given = prompt or Prompt(0, "a prompt", np.arange(1, 4, dtype=np.int32))
    first = asyncio.run(_play(make(), given, turns))
    if repeatable:
        second = asyncio.run(_play(make(), given, turns))
        expect(first == second, f"the same turns and seed gave {first[1]}, then {second[1]}")
    return first[1]


def _maker(environment: type[Environment] | str, arguments: dict[str, Any]) -> Callable[[], Environment]:
    try:
        if isinstance(environment, str):
            return environment_maker(EnvironmentSection(name=environment, arguments=arguments))
        return bind_arguments(f"environment {environment.__name__!r}", environment, arguments)
    except UserError as error:
        raise AssertionError(str(error)) from error


async def _play(environment: Environment, prompt: Prompt, turns: Sequence[str]) -> tuple[str, list[Answer]]:
    opening = await _unblocked("reset", environment.reset(prompt, 7))
    expect(isinstance(opening, str), f"reset returned {type(opening).__name__}, expected text")
    answers: list[Answer] = []
    for text in turns:
        ids = np.frombuffer((text or "\n").encode(), np.uint8).astype(np.int32)
        answer = await _unblocked("step", environment.step(Action(text, ids)))
        expect(isinstance(answer, Answer), f"step returned {type(answer).__name__}, expected an Answer")
        expect(isinstance(answer.observation, str), f"observation {answer.observation!r}, expected text")
        is_number = isinstance(answer.reward, int | float) and math.isfinite(answer.reward)
        expect(is_number, f"reward {answer.reward!r}, expected a finite number")
        expect(isinstance(answer.done, bool), f"done {answer.done!r}, expected a bool")
        answers.append(answer)
        if answer.done:
            break
    if hasattr(environment, "close"):
        closed = environment.close()
        await _unblocked("close", closed) if inspect.isawaitable(closed) else None
    return opening, answers


async def _unblocked(name: str, call: Any) -> Any:
    """Await a coroutine; fail if the event loop did not run for `BLOCKED_SECONDS` meanwhile."""
    loop = asyncio.get_running_loop()
    gaps = [0.0]

    async def tick() -> None:
        while True:
            since = loop.time()
            await asyncio.sleep(TICK_SECONDS)
            gaps.append(loop.time() - since)

    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0)  # start the ticker
    result = await call
    await asyncio.sleep(2 * TICK_SECONDS)
    ticker.cancel()
    expect(max(gaps) < BLOCKED_SECONDS, f"{name} blocked the event loop for {max(gaps):.1f} s: use asyncio.to_thread")
    return result
