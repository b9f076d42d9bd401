"""Event loop thread that runs environments, with a time limit per call.

A sample whose environment raises or exceeds the limit has failed; the caller decides what follows. The same limit detects an
environment that blocks the loop instead of awaiting: the loop is abandoned in its thread and a new one replaces it.
"""

import asyncio
import inspect
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, wait
from typing import Any, Generic, NamedTuple, TypeVar

from rayrlhf.errors import UserError

_logger = logging.getLogger(__name__)

CLOSE_SECONDS = 3.0
"""Maximum wait for environments that are being closed when the loop ends."""
GRACE_SECONDS = 5.0
"""Time beyond the limit of a call after which the loop itself counts as blocked."""


def error_line(error: BaseException) -> str:
    """Return exception and location in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    line = f"{text} ({frames[-1].filename}:{frames[-1].lineno})" if frames else text
    return line.encode("utf-8", "backslashreplace").decode()  # a lone surrogate has no place in a file


Key = TypeVar("Key", bound=Hashable)


class Failed(NamedTuple):
    """Failure of an environment, with the reason in one line."""

    reason: str


class EnvironmentLoop(Generic[Key]):
    """Runs coroutines of environments and collects their results by key.

    Args:
        seconds: time limit of one call.
        grace: see `GRACE_SECONDS`.
    """

    def __init__(self, seconds: float, grace: float = GRACE_SECONDS) -> None:
        self._seconds = seconds
        self._grace = grace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: dict[Key, tuple[Future[Any], float]] = {}
        self._closing: set[Future[Any]] = set()

    def __len__(self) -> int:
        return len(self._pending)

    def start(self, key: Key, call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Start a coroutine; `results` returns its result under `key`."""
        self._pending[key] = (self._run(self._bounded(call)), time.monotonic())

    def close_environment(self, environment: object) -> None:
        """Start an environment's `close`, if it has one.

        Its end is not awaited. A failure is logged.
        """
        close = getattr(environment, "close", None)
        if close is not None:
            future = self._run(self._closed(close))
            self._closing.add(future)
            future.add_done_callback(self._closing.discard)

    def results(self, *, block: bool, all_calls: bool = False, seconds: float = math.inf) -> dict[Key, Any]:
        """Return the results since the last call; a `Failed` for calls that failed.

        Args:
            block: wait for at least one result.
            seconds: time limit of the wait.

        Raises:
            UserError: an environment raised one: a mistake in the run, not in the sample.
        """
        if not self._pending:
            return {}
        if block:
            oldest = min(started for _, started in self._pending.values())
            left = min(max(oldest + self._seconds + self._grace - time.monotonic(), 0.0), seconds)
            when = ALL_COMPLETED if all_calls else FIRST_COMPLETED
            wait([future for future, _ in self._pending.values()], timeout=left, return_when=when)
            self._replace_blocked_loop()
        done = [key for key, (future, _) in self._pending.items() if future.done()]
        return {key: self._result(self._pending.pop(key)[0]) for key in done}

    def cancel(self) -> None:
        """Cancel all calls; further ones may be started."""
        for future, _ in self._pending.values():
            future.cancel()
        self._pending.clear()

    def close(self) -> None:
        """Stop the loop and drop unfinished calls.

        Environments that are being closed have up to `CLOSE_SECONDS`.
        """
        wait(list(self._closing), timeout=CLOSE_SECONDS)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop = None
        self._pending.clear()

    def _run(self, call: Coroutine[Any, Any, Any]) -> Future[Any]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="environments", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    async def _closed(self, close: Callable[[], Any]) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                result = close() if inspect.iscoroutinefunction(close) else await asyncio.to_thread(close)
                await result if inspect.isawaitable(result) else None
        except Exception as error:  # noqa: BLE001 - the boundary to user code; the sample is over
            _logger.warning("an environment could not be closed: %s", error_line(error))

    def _replace_blocked_loop(self) -> None:
        overdue = time.monotonic() - self._seconds - self._grace
        if all(future.done() or started > overdue for future, started in self._pending.values()):
            return
        self._loop = None
        for key, (future, started) in self._pending.items():
            if not future.done():
                lost: Future[Any] = Future()
                lost.set_result(Failed(f"no result within {self._seconds:g} s: an environment blocks instead of awaiting"))
                self._pending[key] = (lost, started)

    async def _bounded(self, call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        try:
            async with asyncio.timeout(self._seconds) as limit:
                return await call()
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary to user code
            if isinstance(error, TimeoutError) and limit.expired():
                return Failed(f"no result within {self._seconds:g} s (environment.timeout_seconds)")
            return Failed(error_line(error))

    @staticmethod
    def _result(future: Future[Any]) -> Any:
        return future.result()
