"""Durable state of a run, whole or not at all.

A checkpoint is one folder, `checkpoints/step-000010`: `state.json` (step, weight version, data cursor, KL coefficient,
running moments) and one sub-folder a learning role, written by its ranks. It is built under a temporary name and renamed
when complete, so whatever has the final name can be resumed from. On several nodes the run folder must be shared storage.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import ray

from rayrlhf.actors.crew import Crew
from rayrlhf.actors.placement import Role
from rayrlhf.actors.waiting import wait_all
from rayrlhf.data.atomic import folder_atomically, write_atomically
from rayrlhf.errors import UserError

LEARNING_ROLES: tuple[Role, ...] = ("policy", "critic")
_NAME = re.compile(r"step-(\d{6,})")


class Checkpoint(NamedTuple):
    """A complete checkpoint on disk."""

    step: int
    folder: Path


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints of a run folder's `checkpoints/`, oldest first. Temporary folders do not match the name."""
    found = []
    for child in folder.glob("step-*"):
        match = _NAME.fullmatch(child.name)
        if match and (child / "state.json").is_file():
            found.append(Checkpoint(int(match[1]), child))
    return sorted(found)


def save_checkpoint(folder: Path, step: int, crew: Crew, state: dict[str, Any], keep: int, seconds: float) -> Path:
    """Write a checkpoint and remove all but the newest `keep`.

    Raises:
        UserError: the disk is full or the folder cannot be written; earlier checkpoints stay usable.
        DeadlineError: a rank did not finish writing in time.
    """
    target = folder / f"step-{step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_atomically(target, if_exists="replace") as partial:
            calls: dict[str, ray.ObjectRef] = {}
            for role in LEARNING_ROLES:
                if role in crew:
                    (partial / role).mkdir()
                    calls |= crew[role].call("save_state", (partial / role).absolute())
            wait_all(calls, "checkpoint", seconds)
            write_atomically(partial / "state.json", json.dumps(state))
    except OSError as error:
        raise UserError(
            f"cannot write checkpoint {target}: {error.strerror or error}; earlier checkpoints are untouched"
        ) from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old.folder)
    return target


def load_checkpoint(checkpoint: Checkpoint, crew: Crew, seconds: float) -> dict[str, Any]:
    """Bring every learning role back to a checkpoint; returns the driver's state."""
    calls: dict[str, ray.ObjectRef] = {}
    for role in LEARNING_ROLES:
        if role in crew:
            calls |= crew[role].call("load_state", (checkpoint.folder / role).absolute())
    wait_all(calls, "resume", seconds)
    state: dict[str, Any] = json.loads((checkpoint.folder / "state.json").read_text())
    return state
