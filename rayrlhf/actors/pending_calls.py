"""What the driver is waiting for just now, of whom and since when, so that the line about a hanging process can say it.

Waits open an entry here and close it; the watch, on its own thread, reads. An entry is the waiter's own table of who still owes
an answer, looked at and never copied, so that waiting for a thousand processes costs what it did before.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_open: list[tuple[str, Mapping[str, float]]] = []


@contextmanager
def track_calls(what: str, since: Mapping[str, float]) -> Iterator[None]:
    """Tell, inside the block, that a call is waited for.

    Args:
        what: the call in words.
        since: actor name -> when it was asked, on the monotonic clock; names may come and go.
    """
    entry = (what, since)
    _open.append(entry)
    try:
        yield
    finally:
        # By identity: two waits may be equal for a moment.
        _open[:] = [other for other in _open if other is not entry]


def pending_call(name: str) -> str:
    """The newest call that an actor owes, such as `generate asked 12 s ago`; empty where it owes none."""
    for what, since in reversed(_open):
        began = since.get(name)
        if began is not None:
            return f"{what} asked {time.monotonic() - began:.0f} s ago"
    return ""
