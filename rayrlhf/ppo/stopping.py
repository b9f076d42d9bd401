"""Being asked to stop: SIGTERM (a scheduler, `ray job stop`) or Ctrl-C ends the run at the next step's end, resumable.

The handler only sets a flag, because a checkpoint cannot be written from inside a signal handler. A second signal ends
the process at once, as it would without this.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether the run was asked to stop.

    Attributes:
        signal_name: what asked, for example `SIGTERM`; None while nobody did.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listen for signals inside the block. Enter it after `ray.init`, which puts handlers of its own in place."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may have handlers; whoever runs a run in another thread stops it otherwise
        return
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in SIGNALS}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name
        for known, handler in before.items():
            signal.signal(known, handler)

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
