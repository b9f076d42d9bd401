"""User errors of workers, written to the run folder to prevent retries."""

import json
from pathlib import Path

from rayrlhf.errors import AlarmError, UserError
from rayrlhf.storage.atomic import write_atomically
from rayrlhf.storage.notes import read_note

_FILE = ".refusal.json"
_KINDS: dict[str, type[Exception]] = {"UserError": UserError, "AlarmError": AlarmError}


def write_refusal(folder: Path, error: UserError | AlarmError) -> None:
    """Write the error; if several workers do, one of them remains."""
    write_atomically(folder / _FILE, json.dumps({"kind": type(error).__name__, "message": str(error)}))


def has_refusal(folder: Path) -> bool:
    """True if a worker of this attempt wrote a user error."""
    return (folder / _FILE).exists()


def clear_refusal(folder: Path) -> None:
    """Remove the error of an earlier attempt."""
    (folder / _FILE).unlink(missing_ok=True)


def raise_refusal(folder: Path) -> None:
    """Raise the error that a worker wrote, if any."""
    if has_refusal(folder):
        found = read_note(folder / _FILE, "a worker refused its input; start the command again to see why")
        clear_refusal(folder)
        raise _KINDS.get(found.get("kind", ""), UserError)(found.get("message", "a worker refused its input"))
