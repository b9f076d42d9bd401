"""State of a run (finished, running, stopped), inferred from its folder without changes.

Trying to take the driver's lock could make a run that starts at that moment reject its own folder. So the kernel's list of
locks is read; it covers this machine's processes. For shared storage that another machine writes, the age of the newest line is
compared with the usual time between lines.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["finished", "running", "stopped", "empty"]
QUIET_STEPS = 5
"""Number of usual step times without a new line after which a run counts as stopped."""
QUIET_SECONDS = 120.0
"""Minimum of that time."""


@dataclass(frozen=True, slots=True)
class RunState:
    """State and progress of a run.

    Attributes:
        state: `empty` before its first line of metrics, if no process holds the folder.
        step: last step with metrics; 0 before.
        total: steps of the whole run; None if unknown.
    """

    state: State
    step: int
    total: int | None

    def words(self) -> str:
        """Return the state in a few words."""
        where = f"step {self.step:,}" + (f" of {self.total:,}" if self.total else "")
        return {
            "finished": f"finished after {self.step:,} steps",
            "running": f"running, at {where}",
            "stopped": f"not finished, stopped at {where}",
            "empty": "no step yet",
        }[self.state]


def judge(
    step: int, total: int | None, *, exported: bool, locked: bool, quiet_seconds: float | None, step_seconds: float | None
) -> RunState:
    """Return the state of a run.

    Args:
        step: last step with metrics; 0 for none.
        total: steps of the whole run, if known.
        exported: its model or result exists.
        locked: a process of this machine holds the folder.
        quiet_seconds: age of the newest line; None without one.
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
    """Return True if a process of this machine holds a lock on the file."""
    try:
        status, text = path.stat(), locks.read_text()
    except OSError:
        return False
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any(wanted in line.split() and "->" not in line.split() for line in text.splitlines())
