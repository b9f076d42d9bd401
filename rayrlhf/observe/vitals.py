"""`vitals.jsonl`: state of a run's processes every few seconds, also of those before a death.

A line of PPO holds the driver's step, the calls it waits for, open requests, each actor's process with the age of its
heartbeat, and memory; one of SFT, reward models, DPO and distillation the workers' processes and peak memory. The file keeps
the newest lines.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from rayrlhf.config.section import GIB
from rayrlhf.observe.memory import peak_resident_bytes
from rayrlhf.storage.atomic import write_atomically

FILE_NAME = "vitals.jsonl"
SECONDS = 5.0
"""Seconds between two lines."""
MAX_BYTES = 2**20
"""Size at which the older half of the lines is dropped."""
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - Ray's object store, only read here


class Vitals:
    """Appends lines in a thread while its block runs.

    Args:
        folder: the run folder.
        read: returns the run's part of a line.
        every: seconds between lines; `SECONDS` if None.
    """

    def __init__(self, folder: Path, read: Callable[[], Mapping[str, Any]], every: float | None = None) -> None:
        self.path = folder / FILE_NAME
        self._read, self._every = read, SECONDS if every is None else every
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rayrlhf-vitals", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join(timeout=10)
        self.write()

    def write(self) -> None:
        """Append a line; a full disk or a table that changes meanwhile leaves it out."""
        with suppress(OSError, RuntimeError):
            line = json.dumps({"time": round(time.time(), 1), **self._read(), "machine": machine_memory()}) + "\n"
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
            if self.path.stat().st_size > MAX_BYTES:
                lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                write_atomically(self.path, "".join(lines[len(lines) // 2 :]))

    def _run(self) -> None:
        while not self._end.wait(self._every):
            self.write()


def local_processes() -> dict[str, Any]:
    """Return this process's Ray workers with their peaks, and the resident size of all descendants.

    It is the run's part of a line where no heartbeat watches actors.
    """
    workers, resident = {}, 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.Error):
            resident += process.memory_info().rss
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and not title.startswith("ray::IDLE"):
                name = f"{title.split()[0].removeprefix('ray::').split('.')[0]}/{process.pid}"  # Ray pads titles
                peak = peak_resident_bytes(Path(f"/proc/{process.pid}/status"))
                workers[name] = {"pid": process.pid, "state": process.status(), "peak_gib": round(peak / GIB, 3)}
    return {"resident_gib": round(resident / GIB, 3), "actors": workers}


def machine_memory() -> dict[str, float]:
    """Return available memory, used swap and used shared memory of this machine, in GiB."""
    sizes = {"available_gib": psutil.virtual_memory().available, "swap_gib": psutil.swap_memory().used}
    with suppress(OSError):
        sizes["object_store_gib"] = shutil.disk_usage(SHARED_MEMORY).used
    return {name: round(size / GIB, 3) for name, size in sizes.items()}
