"""Processes of a run on this machine, with their stacks and last lines of logs."""

import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rayrlhf.config.section import GIB
from rayrlhf.observe.host_limits import temporary_folder
from rayrlhf.observe.stacks import process_stacks
from rayrlhf.tools.report.run_state import is_locked

TAIL_BYTES = 16_384
"""Bytes of a log that are kept from its end."""
MAX_LOGS = 64
_HOLDER = re.compile(r"pid (\d+) on (\S+)")
_OURS = re.compile(r"^ray::(?!IDLE)|rayrlhf[./](?:rewards|environments)|VLLM::|EngineCore")
"""Titles of processes whose stacks say something about a run; Ray's own processes are left out."""


@dataclass(frozen=True, slots=True)
class LiveProcess:
    """One process.

    Attributes:
        name: the actor's name, `driver`, or the process's title.
        state: as the system has it, such as `sleeping` or `stopped`.
        gib: resident memory, shared pages included.
        stacks: empty if they cannot be read.
    """

    pid: int
    name: str
    state: str
    gib: float
    stacks: str = field(repr=False, default="")


def driver_pid(folder: Path) -> int | None:
    """Return the process that holds a run folder, if it is one of this machine."""
    with suppress(OSError):
        holder = _HOLDER.search((folder / ".lock").read_text(encoding="utf-8", errors="replace"))
        if holder and holder[2] == socket.gethostname() and is_locked(folder / ".lock"):
            return int(holder[1])
    return None


def live_processes(driver: int, actors: Mapping[str, Mapping[str, Any]]) -> list[LiveProcess]:
    """Return the driver and the run's processes of this machine, with their stacks.

    Args:
        driver: process number.
        actors: by name, as in the newest line of `vitals.jsonl`.
    """
    names = {driver: "driver"}
    names |= {row["pid"]: name for name, row in actors.items() if isinstance(row.get("pid"), int)}
    found: dict[int, LiveProcess] = {}
    for process in _with_children(names):
        with suppress(psutil.Error):
            title = " ".join(process.cmdline()[:2]) or process.name()
            if process.pid not in names and not _OURS.search(title):
                continue
            gib = process.memory_info().rss / GIB
            name, state = names.get(process.pid, title), process.status()
            found[process.pid] = LiveProcess(process.pid, name, state, gib, process_stacks(process.pid))
    return list(found.values())


def environments(pids: Sequence[int]) -> list[dict[str, str]]:
    """Return the environment variables of processes, to find the secrets among them."""
    found = []
    for pid in pids:
        with suppress(psutil.Error):
            found.append(psutil.Process(pid).environ())
    return found


def log_tails(pids: Mapping[str, int], since: float) -> dict[str, str]:
    """Return the last lines of Ray's logs of processes, by file name.

    Args:
        pids: actor name -> process number.
        since: seconds since the epoch; older files are of other processes with this number.
    """
    files = sorted(_logs(set(pids.values()), since), key=lambda path: path.stat().st_mtime, reverse=True)
    by_pid = {pid: name for name, pid in pids.items()}
    tails = {}
    for path in files[:MAX_LOGS]:
        text = tail(path)
        if text.strip():
            pid = int(path.stem.rpartition("-")[2])
            tails[f"{by_pid.get(pid, 'process').replace('/', '-')}-{path.name}"] = text
    return tails


def tail(path: Path, size: int = TAIL_BYTES) -> str:
    """Return the last whole lines of a file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return text if end <= size else text.partition("\n")[2]


def _logs(pids: set[int], since: float) -> Iterator[Path]:
    for path in (temporary_folder() / "ray").glob("session_*/logs/worker-*-*.*"):
        number = path.stem.rpartition("-")[2]
        with suppress(OSError):
            if path.suffix in (".out", ".err") and number.isdigit() and int(number) in pids and path.stat().st_mtime >= since:
                yield path


def _with_children(names: Mapping[int, str]) -> Iterator[psutil.Process]:
    seen: set[int] = set()
    for pid in names:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            for member in (process, *process.children(recursive=True)):
                if member.pid not in seen:
                    seen.add(member.pid)
                    yield member
