"""Many samples at their environments at once: one event loop in a thread of its own, and a bound on every answer.

A sample whose environment raises or overruns has failed; what that means is for the caller to say. An environment that blocks
the loop instead of awaiting is found out by the same bound: the loop is left behind in its thread and a new one takes over.
"""

import asyncio
import math
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, wait
from typing import Any, Generic, NamedTuple, TypeVar

from rayrlhf.errors import UserError

GRACE_SECONDS = 5.0
"""What an answer may take beyond its bound until the loop itself counts as blocked."""


def told(error: BaseException) -> str:
    """What somebody else's code raised, and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    said = " ".join("".join(traceback.format_exception_only(error)).split())
    return f"{said} ({frames[-1].filename}:{frames[-1].lineno})" if frames else said


Key = TypeVar("Key", bound=Hashable)


class Failed(NamedTuple):
    """What went wrong with an environment, in one line."""

    reason: str


class Table(Generic[Key]):
    """Waits for environments.

    Args:
        seconds: longest time of one answer.
        grace: see `GRACE_SECONDS`.
    """

    def __init__(self, seconds: float, grace: float = GRACE_SECONDS) -> None:
        self._seconds = seconds
        self._grace = grace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: dict[Key, tuple[Future[Any], float]] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def ask(self, key: Key, question: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Start a coroutine; its result comes out of `answers` under `key`."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="environments", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(self._bounded(question), self._loop)
        self._pending[key] = (future, time.monotonic())

    def answers(self, *, block: bool, all_of_them: bool = False, seconds: float = math.inf) -> dict[Key, Any]:
        """Return what has been answered since the last call, a `Failed` for what failed.

        Args:
            block: wait until there is something.
            all_of_them: wait for everything that was asked.
            seconds: wait no longer than this.

        Raises:
            UserError: an environment raised one: it is the run's mistake and not the sample's.
        """
        if not self._pending:
            return {}
        if block:
            oldest = min(asked for _, asked in self._pending.values())
            left = min(max(oldest + self._seconds + self._grace - time.monotonic(), 0.0), seconds)
            when = ALL_COMPLETED if all_of_them else FIRST_COMPLETED
            wait([future for future, _ in self._pending.values()], timeout=left, return_when=when)
            self._leave_blocked_loop()
        done = [key for key, (future, _) in self._pending.items() if future.done()]
        return {key: self._result(self._pending.pop(key)[0]) for key in done}

    def drop(self) -> None:
        """Ask nothing any more of what was asked; further questions are welcome."""
        for future, _ in self._pending.values():
            future.cancel()
        self._pending.clear()

    def close(self) -> None:
        """Stop the loop; what is still asked is dropped."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop = None
        self._pending.clear()

    def _leave_blocked_loop(self) -> None:
        overdue = time.monotonic() - self._seconds - self._grace
        if all(future.done() or asked > overdue for future, asked in self._pending.values()):
            return
        self._loop = None
        for key, (future, asked) in self._pending.items():
            if not future.done():
                lost: Future[Any] = Future()
                lost.set_result(Failed(f"no answer within {self._seconds:g} s: an environment blocks, where it should await"))
                self._pending[key] = (lost, asked)

    async def _bounded(self, question: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        try:
            async with asyncio.timeout(self._seconds) as limit:
                return await question()
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary to other people's code
            if isinstance(error, TimeoutError) and limit.expired():
                return Failed(f"no answer within {self._seconds:g} s (environment.timeout_seconds)")
            return Failed(told(error))

    @staticmethod
    def _result(future: Future[Any]) -> Any:
        return future.result()
