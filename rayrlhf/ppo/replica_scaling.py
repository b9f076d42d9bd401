"""How many rollout replicas a running job is wanted to have: a small file in its folder, written by anyone, read at every step.

The wish stays until there is another one, also over a resume.
"""

import fcntl
import json
from pathlib import Path

from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import write_atomically, writing

FILE_NAME = "wanted.json"


def want_replicas(folder: Path, count: int) -> None:
    """Ask the driver of a run for `count` rollout replicas.

    Raises:
        UserError: no run is there, nobody drives it, it is an exact one, or it needs more.
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
    least = stored["recovery"]["min_replicas"]
    if count < least:
        raise UserError(f"--rollout {count}: the run needs at least {least} (recovery.min_replicas)")
    if not _is_driven(folder):
        raise UserError(f"{folder}: no driver runs in it; start it with rollout.replicas={count}")
    with writing(folder / FILE_NAME):
        write_atomically(folder / FILE_NAME, json.dumps({"rollout": count}))


def wanted_replicas(folder: Path) -> int | None:
    """What was asked for last, or None."""
    path = folder / FILE_NAME
    return int(json.loads(path.read_text(encoding="utf-8"))["rollout"]) if path.is_file() else None


def _is_driven(folder: Path) -> bool:
    """Whether a process holds the folder's lock; on a file system without locks, whether one ever did."""
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
