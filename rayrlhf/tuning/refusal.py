"""User errors of workers, written to the run folder to prevent retries."""

import json
from pathlib import Path

from rayrlhf.errors import AlarmError, UserError
from rayrlhf.storage.atomic import write_atomically

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
        found = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        clear_refusal(folder)
        raise _KINDS[found["kind"]](found["message"])
