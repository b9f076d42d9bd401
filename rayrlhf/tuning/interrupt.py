"""Being asked to stop while Ray Train works: Ctrl-C and SIGTERM end as the project's own error, and handlers are put back."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rayrlhf.errors import StoppedError


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn the exits that the handlers of Ray and Ray Train make into a `StoppedError`.

    Ray leaves the process with `SystemExit` on SIGTERM; Ray Train ends the run and does the same on Ctrl-C, and leaves its
    handler in place.

    Raises:
        StoppedError: the run was asked to stop; its last committed checkpoint is there to go on from.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        raise StoppedError("stopped as asked; the same command goes on from the last checkpoint") from error
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
