"""`gym`: plays an environment with Gymnasium's interface, in threads of its own."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any

from rayrlhf.data.records import Prompt
from rayrlhf.environments.protocol import Action, Answer
from rayrlhf.plugins import Registry, bind_arguments

_MAKERS: Registry[Callable[..., Any]] = Registry("environment.arguments.make", {})


class Gym:
    """Passes turns to `step` as text, and observations to the policy as text.

    `reset` receives the seed and, as `options`, the columns of the dataset's row and its `prompt`. `terminated` and `truncated`
    end the sample. An environment of other actions needs a wrapper, `gymnasium.ActionWrapper` for example. Its `close` is
    called when the sample is over, after a call that still runs.

    Args:
        make: function or class that returns the environment, such as `gymnasium:make` or `games.py:Game`.
        arguments: its keyword arguments, such as `id`.
    """

    def __init__(self, make: str, arguments: Mapping[str, Any] | None = None) -> None:
        function = _MAKERS.resolve(make)
        self._make = bind_arguments(f"environment.arguments.make {make!r}", function, arguments or {})
        self._game: Any = None
        self._busy, self._over = threading.Lock(), False

    async def reset(self, prompt: Prompt, seed: int) -> str:
        """Make the environment; returns its first observation.

        Raises:
            TypeError: it returns something else than (observation, info).
        """

        def start() -> Any:
            self._game = self._make()
            return self._game.reset(seed=seed % 2**31, options={**prompt.columns, "prompt": prompt.text})

        result = await asyncio.to_thread(self._alone, start)
        observation, _ = _parts(result, "reset", ("observation", "info"))
        return str(observation)

    async def step(self, action: Action) -> Answer:
        """Pass a turn on.

        Raises:
            TypeError: the environment returns something else than (observation, reward, terminated, truncated, info).
        """
        names = ("observation", "reward", "terminated", "truncated", "info")
        result = await asyncio.to_thread(self._alone, lambda: self._game.step(action.text))
        observation, reward, terminated, truncated, _ = _parts(result, "step", names)
        return Answer(str(observation), float(reward), bool(terminated or truncated))

    async def close(self) -> None:
        """Close the environment, or leave it to a call that still runs in its thread."""
        self._over = True
        await asyncio.to_thread(self._close)

    def _alone(self, call: Callable[[], Any]) -> Any:
        """Run a call of the environment.

        If the sample is over meanwhile, the environment is closed after it.
        """
        try:
            with self._busy:
                if self._over:
                    raise RuntimeError("the sample is over")
                return call()
        finally:
            if self._over:
                self._close()

    def _close(self) -> None:
        if not self._busy.acquire(blocking=False):
            return  # `_alone` closes it then
        try:
            game, self._game = self._game, None
            if hasattr(game, "close"):
                game.close()
        finally:
            self._busy.release()


def _parts(result: Any, method: str, names: tuple[str, ...]) -> tuple[Any, ...]:
    if not isinstance(result, tuple) or len(result) != len(names):
        raise TypeError(f"{method} returned {result!r:.80}, expected ({', '.join(names)}) as in Gymnasium")
    return result
