"""Whether a run is finished, still going, or was left: told from what its folder shows, without touching it.

The driver's lock would tell, but trying to take it could make a run that starts in that moment refuse its own folder. The
kernel's list of locks is only read; it knows this machine's processes. For a folder on shared storage that another machine
writes, the age of the newest line against the usual time between lines has to do.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["finished", "running", "stopped", "empty"]
QUIET_STEPS = 5
"""Usual step times without a new line after which a run counts as left."""
QUIET_SECONDS = 120.0
"""The least such silence."""


@dataclass(frozen=True, slots=True)
class RunState:
    """How far a run is.

    Attributes:
        state: `empty` before its first line of metrics, if nobody holds the folder.
        step: last step with metrics; 0 before.
        total: steps the run is to have; None where that is not known.
    """

    state: State
    step: int
    total: int | None

    def words(self) -> str:
        """Return the state in a few words."""
        where = f"step {self.step:,}" + (f" of {self.total:,}" if self.total else "")
        return {
            "finished": f"finished after {self.step:,} steps",
            "running": f"still going, at {where}",
            "stopped": f"not finished, left at {where}",
            "empty": "no step yet",
        }[self.state]


def judge(
    step: int, total: int | None, *, exported: bool, locked: bool, quiet_seconds: float | None, step_seconds: float | None
) -> RunState:
    """Return the state of a run.

    Args:
        step: last step with metrics; 0 for none.
        total: steps it is to have, if known.
        exported: whether its model or result is there.
        locked: whether a process of this machine holds the folder.
        quiet_seconds: age of the newest line; None where there is none.
        step_seconds: usual seconds of a step, if known.
    """
    if locked:
        return RunState("running", step, total)
    if exported or (total is not None and step >= total > 0):
        return RunState("finished", step, total)
    if quiet_seconds is None:
        return RunState("empty", step, total)
    patience = max(QUIET_SECONDS, QUIET_STEPS * (step_seconds or 0.0))
    return RunState("running" if quiet_seconds < patience else "stopped", step, total)


def is_locked(path: Path, locks: Path = Path("/proc/locks")) -> bool:
    """Whether a process of this machine holds a lock on a file; False where the system does not tell."""
    try:
        status, text = path.stat(), locks.read_text()
    except OSError:
        return False
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any(wanted in line.split() and "->" not in line.split() for line in text.splitlines())
