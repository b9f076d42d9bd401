"""Messages between driver and workers, as files of the run folder.

A message is a user error, which prevents retries, or a stop request.
"""

import json
from pathlib import Path

from rayrlhf.errors import AlarmError, UserError
from rayrlhf.storage.atomic import write_atomically
from rayrlhf.storage.notes import read_note

_FILE = ".refusal.json"
_STOP = ".stop"
_KINDS: dict[str, type[Exception]] = {"UserError": UserError, "AlarmError": AlarmError}


def write_refusal(folder: Path, error: UserError | AlarmError) -> None:
    """Write the error; if several workers do, one of them remains."""
    write_atomically(folder / _FILE, json.dumps({"kind": type(error).__name__, "message": str(error)}))


def has_refusal(folder: Path) -> bool:
    """True if a worker of this attempt wrote a user error."""
    return (folder / _FILE).exists()


def request_stop(folder: Path) -> None:
    """Request that the workers write a checkpoint after their current step and end."""
    (folder / _STOP).touch()


def has_stop_request(folder: Path) -> bool:
    """True if the driver of this attempt got a stop signal."""
    return (folder / _STOP).exists()


def clear_refusal(folder: Path) -> None:
    """Remove the error and the stop request of an earlier attempt."""
    for name in (_FILE, _STOP):
        (folder / name).unlink(missing_ok=True)


def raise_refusal(folder: Path) -> None:
    """Raise the error that a worker wrote, if any."""
    if has_refusal(folder):
        found = read_note(folder / _FILE, "a worker refused its input; start the command again to see why")
        clear_refusal(folder)
        raise _KINDS.get(found.get("kind", ""), UserError)(found.get("message", "a worker refused its input"))
