"""Control of training loops: stop signals and periodic actions.

SIGTERM (from a scheduler or `ray job stop`) and Ctrl-C stop a run so that it can be resumed. Enter the contexts after
`ray.init`, which installs handlers of its own. Only the main thread can have signal handlers; in other threads none are
installed.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rayrlhf.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Flag that is true once a stop signal arrived.

    Attributes:
        signal_name: name of the signal, for example `SIGTERM`; None before.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record stop signals inside the block, for loops that stop after a step.

    The handler only sets a flag, because a checkpoint cannot be written inside a signal handler. A second signal ends the
    process at once, as it would without this context.
    """
    request = StopRequest()

    def record(number: int, frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name
        _install(before)

    with _handlers(dict.fromkeys(SIGNALS, record)) as before:
        yield request


@contextmanager
def stop_as_error() -> Iterator[None]:
    """Raise `StoppedError` on a stop signal, for a block that Ray Train runs.

    Ray Train handles Ctrl-C itself: it ends the run, raises `SystemExit`, and leaves its handler installed.

    Raises:
        StoppedError: a signal arrived; the run resumes from its last committed checkpoint.
    """
    with _handlers({signal.SIGTERM: _interrupt}):
        try:
            yield
        except (SystemExit, KeyboardInterrupt) as error:
            raise StoppedError("stopped as asked; the same command goes on from the last checkpoint") from error


def is_due(step: int, every: int) -> bool:
    """Return True at every `every`-th step; never if `every` is 0."""
    return every > 0 and step % every == 0


@contextmanager
def _handlers(handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[dict[signal.Signals, Any]]:
    """Install handlers inside the block and restore the former ones, which it yields."""
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    _install(handlers)
    try:
        yield before
    finally:
        _install(before)


def _install(handlers: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
