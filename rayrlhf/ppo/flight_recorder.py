"""Writes the record of each step while the next one runs."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from rayrlhf.observe.flight_record import rewind_records, write_record
from rayrlhf.ppo.executed_step import ExecutedStep, to_record
from rayrlhf.storage.atomic import remove_leftovers, writing

_WAITING = 2
"""Steps that may wait for the disk, so that a slow one bounds memory."""


class FlightRecorder:
    """Observer of a run's steps that writes their records in a thread of its own.

    Attributes:
        weights: a record holds checksums of all weights.
    """

    def __init__(self, folder: Path, level: Literal["light", "full"]) -> None:
        """Use `folder`, usually `run_folder/records`; it is created when missing.

        Raises:
            UserError: it cannot be created.
        """
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        self.weights = level == "full"
        self._folder = folder
        self._level = level
        self._thread = ThreadPoolExecutor(1, "flight-recorder")
        self._waiting: deque[Future[None]] = deque()
        self._spent = self._told = 0.0

    def __call__(self, executed: ExecutedStep) -> None:
        """Write the record of a step in the background.

        Raises:
            UserError: an earlier record could not be written.
        """
        self._settle(_WAITING - 1)
        self._waiting.append(self._thread.submit(self._write, executed))

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of the thread since the last call."""
        spent = self._spent
        since, self._told = spent - self._told, spent
        return since

    def rewind(self, step: int) -> None:
        """Delete the records of later steps, before a run continues after `step`."""
        self._settle(0)
        rewind_records(self._folder, step)

    def close(self) -> None:
        """Wait until all records are on the disk.

        Raises:
            UserError: one could not be written.
        """
        self._thread.shutdown()
        self._settle(0)

    def _write(self, executed: ExecutedStep) -> None:
        began = time.thread_time()
        write_record(self._folder, to_record(executed, self._level))
        self._spent += time.thread_time() - began

    def _settle(self, allowed: int) -> None:
        while len(self._waiting) > allowed:
            self._waiting.popleft().result()
