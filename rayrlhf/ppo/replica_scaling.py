"""Requested number of rollout replicas of a running job, a file in its folder.

Any process may write it; the driver reads it at every step. A request stays until the next one, also over a resume.
"""

import fcntl
import json
from collections.abc import Callable
from pathlib import Path

from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import write_atomically, writing
from rayrlhf.storage.notes import read_note, reading

FILE_NAME = "wanted.json"


def want_replicas(folder: Path, count: int) -> None:
    """Request `count` rollout replicas of a run.

    Raises:
        UserError: no run folder, no running driver, an exact run, or fewer than `recovery.min_replicas`.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder}: no run folder (it has no config.yaml)")
    stored = read_note(config)
    if "rollout" not in stored:
        raise UserError(f"{folder}: not a PPO run, so it has no rollout replicas")
    with reading(config, "restore it, or remove it"):
        exact, smallest = stored["run"]["determinism"] == "exact", int(stored["recovery"]["min_replicas"])
    if exact:
        raise UserError(f"{folder}: run.determinism is 'exact', which fixes the number of replicas")
    if count < smallest:
        raise UserError(f"--rollout {count}: the run needs at least {smallest} (recovery.min_replicas)")
    if not _is_driven(folder):
        raise UserError(f"{folder}: no running driver; start it with rollout.replicas={count}")
    with writing(folder / FILE_NAME):
        write_atomically(folder / FILE_NAME, json.dumps({"rollout": count}))


def wanted_replicas(folder: Path, note: Callable[[str], None]) -> int | None:
    """Return the last requested number, or None.

    Args:
        folder: the run folder.
        note: receives a line about a damaged request, which is removed.
    """
    path = folder / FILE_NAME
    try:
        found = read_note(path, "the number of replicas stays")
        with reading(path, "the number of replicas stays"):
            count = int(found["rollout"])
            if count < 1:
                raise ValueError(f"rollout: expected at least 1, found {count}")
            return count
    except FileNotFoundError:
        return None
    except UserError as error:
        path.unlink(missing_ok=True)
        note(str(error))
        return None


def _is_driven(folder: Path) -> bool:
    """True if a process holds the folder's lock; without file locks, if one ever did."""
    path = folder / ".lock"
    if not path.is_file():
        return False
    with path.open(encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return True
    return False
