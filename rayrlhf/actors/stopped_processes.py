"""Monitor of stopped processes (SIGSTOP) of the Ray that this process started.

A stopped process is reported after `NAME_SECONDS` and killed after `LOST_SECONDS`. Ray Train and Ray Data wait without end for
a worker that is stopped while it starts. Killing it turns this into a loss, which they repair. PPO's actors have
`rayrlhf.actors.heartbeat`, which also reaches other machines.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

NAME_SECONDS, LOST_SECONDS = 30.0, 120.0
EVERY_SECONDS = 5.0


class StoppedProcesses:
    """Monitors the descendants of this process between `__enter__` and `__exit__`.

    Args:
        tell: receives the lines.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._since: dict[tuple[int, float], float] = {}
        self._named: set[tuple[int, float]] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rayrlhf-stopped", daemon=True)

    def __enter__(self) -> "StoppedProcesses":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join(timeout=10)

    def check(self, now: float) -> None:
        """Report and kill stopped processes; `now` is a time of the monotonic clock."""
        stopped = {}
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                title = " ".join(process.cmdline()).split(".")[0]
                if title.startswith("ray::") and process.status() == psutil.STATUS_STOPPED:
                    stopped[process.pid, process.create_time()] = process, title
        self._since = {key: self._since.get(key, now) for key in stopped}
        for key, (process, title) in stopped.items():
            seconds = now - self._since[key]
            name = f"{title.removeprefix('ray::')} (process {process.pid})"
            if seconds >= LOST_SECONDS:
                self._tell(f"{name}: stopped for {seconds:.0f} s; the process is killed")
                with suppress(psutil.Error):
                    process.kill()
            elif seconds >= NAME_SECONDS and key not in self._named:
                self._named.add(key)
                self._tell(f"{name}: stopped for {seconds:.0f} s; it counts as lost after {LOST_SECONDS:.0f} s")

    def _run(self) -> None:
        while not self._end.wait(EVERY_SECONDS):
            self.check(time.monotonic())
