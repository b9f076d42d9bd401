"""Registry of the driver's pending calls, for the message about a hanging process.

Waits add an entry and remove it; the heartbeat monitor reads from its own thread. An entry is the waiter's own table of pending
calls and is never copied, so that waiting for a thousand processes costs no more than without it.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_open: list[tuple[str, Mapping[str, float]]] = []


@contextmanager
def track_calls(what: str, since: Mapping[str, float]) -> Iterator[None]:
    """Register a pending call inside the block.

    Args:
        since: actor name -> time of the call on the monotonic clock; names may come and go.
    """
    entry = (what, since)
    _open.append(entry)
    try:
        yield
    finally:
        # By identity: two waits may be equal for a moment.
        _open[:] = [other for other in _open if other is not entry]


def pending_call(name: str) -> str:
    """Return an actor's newest pending call, such as `generate called 12 s ago`, or ''."""
    for what, since in reversed(_open):
        began = since.get(name)
        if began is not None:
            return f"{what} called {time.monotonic() - began:.0f} s ago"
    return ""
