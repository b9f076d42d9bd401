"""Conversion of Ctrl-C and SIGTERM during Ray Train into `StoppedError`."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rayrlhf.errors import StoppedError


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn a request to stop into a `StoppedError`.

    Enter it after `ray.init`, whose own handler of SIGTERM aborts the process.

    Ray Train takes Ctrl-C for itself: it ends the run, leaves by `SystemExit`, and leaves its handler in place.

    Raises:
        StoppedError: the run was asked to stop; its last committed checkpoint is there to go on from.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    if main:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        raise StoppedError("stopped as asked; the same command goes on from the last checkpoint") from error
    finally:
        if main:
            for number, handler in before.items():
                signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
