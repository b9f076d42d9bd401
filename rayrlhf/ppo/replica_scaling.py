"""Requested number of rollout replicas of a running job, a file in its folder.

Any process may write it; the driver reads it at every step. A request stays until the next one, also over a resume.
"""

import fcntl
import json
from pathlib import Path

from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import write_atomically, writing

FILE_NAME = "wanted.json"


def want_replicas(folder: Path, count: int) -> None:
    """Request `count` rollout replicas of a run.

    Raises:
        UserError: no run folder, no running driver, an exact run, or fewer than `recovery.min_replicas`.
    """
    import yaml

    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder}: no run folder (it has no config.yaml)")
    stored = yaml.safe_load(config.read_text(encoding="utf-8"))
    if "rollout" not in stored:
        raise UserError(f"{folder}: not a PPO run, so it has no rollout replicas")
    if stored["run"]["determinism"] == "exact":
        raise UserError(f"{folder}: run.determinism is 'exact', which fixes the number of replicas")
    smallest = stored["recovery"]["min_replicas"]
    if count < smallest:
        raise UserError(f"--rollout {count}: the run needs at least {smallest} (recovery.min_replicas)")
    if not _is_driven(folder):
        raise UserError(f"{folder}: no running driver; start it with rollout.replicas={count}")
    with writing(folder / FILE_NAME):
        write_atomically(folder / FILE_NAME, json.dumps({"rollout": count}))


def wanted_replicas(folder: Path) -> int | None:
    """Return the last requested number, or None."""
    path = folder / FILE_NAME
    return int(json.loads(path.read_text(encoding="utf-8"))["rollout"]) if path.is_file() else None


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
