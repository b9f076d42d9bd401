"""Stacks of all threads of a Python process, also of one that hangs.

py-spy reads them from outside, where the system allows it, also of a process that is stopped. Elsewhere the process writes them
itself when it is signaled: to a file in memory, by C code that needs no lock of the interpreter.
"""

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO

FOLDER = "stacks"
"""Folder in the run folder with the stacks of processes that hung."""
MAX_FILES = 64
"""Files kept in it; later ones are not written."""
SIGNAL = signal.SIGUSR2
_NAME = "rayrlhf-stacks"
_SECONDS = 3.0
"""Longest wait for the stacks of a process."""
_file: IO[str] | None = None


def write_on_signal() -> None:
    """Let this process write its stacks when `process_stacks` signals it; once per process.

    A process that handles the signal otherwise, or has no files in memory, is left alone.
    """
    global _file
    if _file is None and hasattr(os, "memfd_create") and signal.getsignal(SIGNAL) == signal.SIG_DFL:
        _file = os.fdopen(os.memfd_create(_NAME), "w")
        faulthandler.register(SIGNAL, file=_file, all_threads=True)


def own_stacks() -> str:
    """Return the stacks of this process, the newest call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        parts.append(f"Thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


def process_stacks(pid: int) -> str:
    """Return the stacks of a process of this machine; empty if they cannot be read."""
    return own_stacks() if pid == os.getpid() else _from_outside(pid) or _from_inside(pid)


def save_stacks(folder: Path, name: str, text: str) -> Path | None:
    """Write the stacks of an actor to a run folder; returns the file.

    None when there are enough.

    Raises:
        OSError: the file cannot be written.
    """
    target = folder / FOLDER
    target.mkdir(exist_ok=True)
    if len(list(target.iterdir())) >= MAX_FILES:
        return None
    path = target / f"{time.strftime('%Y%m%d-%H%M%S')}-{name.replace('/', '-')}.txt"
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def _from_outside(pid: int) -> str:
    program = shutil.which("py-spy", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if program is None:
        return ""
    stopped = ["--nonblocking"] if _status(pid, "State")[:1] in ("T", "t") else []
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            [program, "dump", *stopped, "--pid", str(pid)], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        return found.stdout if found.returncode == 0 else ""
    return ""


def _from_inside(pid: int) -> str:
    """Signal a process that called `write_on_signal`, and read the stacks that it writes."""
    with suppress(OSError, ValueError):
        files = (path for path in Path(f"/proc/{pid}/fd").iterdir() if _NAME in str(path.readlink()))
        path = next(files, None)
        if path is None or not int(_status(pid, "SigCgt"), 16) >> (SIGNAL - 1) & 1:
            return ""
        before = size = path.stat().st_size
        os.kill(pid, SIGNAL)
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end:
            time.sleep(0.05)
            latest = path.stat().st_size
            if before < size == latest:
                break
            size = latest
        with path.open("rb") as file:
            file.seek(before)
            return file.read().decode("utf-8", "replace")
    return ""


def _status(pid: int, field: str) -> str:
    """Return a field of the kernel's description of a process; empty without it."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return value.strip()
    return ""
