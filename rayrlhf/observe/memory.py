"""Peak memory of a whole run: this process and its descendants.

Resident sizes of processes must not be added up: actors map the same object store and the same libraries. Each process is
therefore counted with its proportional set size (PSS: a page that n processes map counts 1/n for each), and the sum is the
memory that the run really takes. Without PSS (not Linux, or another user's process) the resident size is used.

Reading PSS walks a process's page table (20-100 ms for 1 GiB in small pages), too expensive twice a second. Resident sizes are
cheap, so they are monitored, and PSS is read when their sum has grown since the last reading.
"""

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

GROWTH = 1.01
"""Growth factor of the largest resident sum at which PSS is read again."""
MAX_TIME_SHARE = 0.05
"""Maximum share of one core's time for reading PSS."""


class PeakMemory:
    """Samples memory in a thread while its block runs.

    Example:
        with PeakMemory() as memory:
            ...
        memory.peak_bytes

    Attributes:
        peak_bytes: largest sampled sum over all processes.
        samples: number of PSS readings.
        resident_bytes: newest sum of the resident sizes.
    """

    def __init__(self, interval_seconds: float = 0.5) -> None:
        """Set the time between readings of the resident sizes."""
        self.peak_bytes = 0
        self.samples = 0
        self.resident_bytes = 0
        self._interval = interval_seconds
        self._largest_resident = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()

    def sample(self) -> int:
        """Read PSS now, at any cost; returns the sum in bytes."""
        total = sum(memory_bytes(pid) for pid, _ in process_tree([os.getpid()]))
        self.samples += 1
        self.peak_bytes = max(self.peak_bytes, total)
        return total

    def _run(self) -> None:
        pause = self._interval
        while not self._stop.wait(pause):
            pause = self._interval
            self.resident_bytes = resident = sum(resident_bytes(pid) for pid, _ in process_tree([os.getpid()]))
            if resident > GROWTH * self._largest_resident:
                self._largest_resident = resident
                start = time.thread_time()
                self.sample()
                pause = max(pause, (time.thread_time() - start) / MAX_TIME_SHARE)


def memory_limit_bytes() -> int:
    """Return the memory limit of the machine or container, in bytes."""
    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def process_tree(pids: Iterable[int]) -> list[tuple[int, str]]:
    """Return (pid, name) of running processes and their descendants, without duplicates."""
    found: dict[int, str] = {}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            for member in (process, *process.children(recursive=True)):
                found[member.pid] = member.name()
        except psutil.NoSuchProcess:
            continue
    return sorted(found.items())


def memory_bytes(pid: int) -> int:
    """Return a process's proportional (else resident) set size in bytes; 0 after its end."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # no such file system, no permission, or the process just ended: use the resident size
    return resident_bytes(pid)


def resident_bytes(pid: int) -> int:
    """Return a process's resident size in bytes, shared pages included; 0 once it ended."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def peak_resident_bytes(status: Path) -> int:
    """Return a process's largest resident size in bytes, from its `status` file; 0 without one."""
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
