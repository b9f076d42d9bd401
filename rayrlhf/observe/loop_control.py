"""Control of training loops: stop signals and periodic actions.

SIGTERM (from a scheduler or `ray job stop`), SIGHUP (from a terminal that closes) and Ctrl-C stop a run so that it can be
resumed. `timeout`, Slurm and terminals signal a process and its group, so the same stop arrives several times. Only the main
thread can have signal handlers; in other threads none are installed.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rayrlhf.config.section import in_job_folder, lasting
from rayrlhf.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
REPEAT_SECONDS = 2.0
"""Further signals within this time belong to the first one."""
STEP_GRACE_SECONDS = 10.0
"""Time for the current step to finish, before work that changed no state is abandoned."""
_POLL_SECONDS = 0.5


class StopRequest:
    """Flag that is true once a stop signal arrived.

    Attributes:
        signal_name: name of the signal, for example `SIGTERM`; None before.
        may_abandon: returns True while the main thread may be interrupted without a loss of state. None, while there is no
            state: a signal then interrupts it at once.
        overdue: True once the main thread is interrupted.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.may_abandon: Callable[[], bool] | None = None
        self.overdue = False
        self._since = 0.0
        self._settled = threading.Event()

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def settle(self) -> None:
        """End the watch over the current step, because the run acts on the request now."""
        self._settled.set()

    def _watch(self, seconds: float) -> None:
        """Interrupt the main thread when its step takes too long."""
        main = threading.main_thread().ident
        while not self._settled.wait(_POLL_SECONDS):
            passed = time.monotonic() - self._since
            idle = passed > min(STEP_GRACE_SECONDS, seconds / 2) and (self.may_abandon is None or self.may_abandon())
            if (idle or passed > seconds) and main is not None:
                self.overdue = True
                signal.pthread_kill(main, signal.SIGTERM)
                return


@contextmanager
def stop_requests(seconds: float = 300.0) -> Iterator[StopRequest]:
    """Record stop signals inside the block, for loops that stop after a step.

    The handler only sets a flag, because a checkpoint cannot be written inside a signal handler. A second signal ends the
    process at once, as it would without this context.

    Args:
        seconds: maximum time for the step; then `KeyboardInterrupt` is raised in the main thread.

    Raises:
        StoppedError: the block was interrupted.
    """
    request = StopRequest()

    def record(number: int, frame: FrameType | None) -> None:
        if request.overdue:
            request.overdue = False  # raise once
            raise KeyboardInterrupt
        if request:
            if time.monotonic() - request._since > REPEAT_SECONDS:
                _install(before)
                signal.raise_signal(number)
            return
        request.signal_name, request._since = signal.Signals(number).name, time.monotonic()
        if number == signal.SIGHUP:
            _leave_terminal()
        if request.may_abandon is None:
            raise KeyboardInterrupt
        threading.Thread(target=request._watch, args=(seconds,), name="stop-deadline", daemon=True).start()

    with _handlers(dict.fromkeys(SIGNALS, record)) as before:
        try:
            yield request
        except KeyboardInterrupt as error:
            if not request or isinstance(error.__context__, StoppedError):
                raise
            raise StoppedError(f"stopped on {request.signal_name}; the same command resumes") from None
        finally:
            request.settle()


@contextmanager
def stop_as_error() -> Iterator[None]:
    """Raise `StoppedError` on a stop signal.

    For a block whose work is on the disk already.

    Raises:
        StoppedError: a signal arrived.
    """
    seen: list[tuple[str, float]] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if seen and time.monotonic() - seen[0][1] < REPEAT_SECONDS:
            return
        seen.insert(0, (signal.Signals(number).name, time.monotonic()))
        if number == signal.SIGHUP:
            _leave_terminal()
        raise KeyboardInterrupt

    with _handlers(dict.fromkeys(SIGNALS, interrupt)):
        try:
            yield
        except KeyboardInterrupt as error:
            name = seen[0][0] if seen else "SIGINT"
            raise StoppedError(f"stopped on {name}; the same command resumes") from error


def job_lines() -> list[str]:
    """Return the first lines of a Ray job: the folder of its results."""
    if not in_job_folder():
        return []
    return [f"Ray job: a relative run.root is below {lasting(Path())}, because the working directory is deleted after the job"]


def is_due(step: int, every: int) -> bool:
    """Return True at every `every`-th step; never if `every` is 0."""
    return every > 0 and step % every == 0


@contextmanager
def _handlers(handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[dict[signal.Signals, Any]]:
    """Install handlers inside the block and restore the former ones, which it yields.

    Under `nohup` SIGHUP stays ignored.
    """
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    _install({number: handler for number, handler in handlers.items() if before[number] is not signal.SIG_IGN})
    try:
        yield before
    finally:
        _install(before)


def _install(handlers: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Discard output to a closed terminal, where the next line would be an error."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None and stream.isatty():
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
