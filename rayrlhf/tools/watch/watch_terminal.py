"""Terminal view of a run from another process, with the driver's panel.

The run folder is only read, so it may be on storage shared with the run's machine.
"""

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from rayrlhf.observe.live import LiveView
from rayrlhf.tools.report.run_files import MetricsTail, Row
from rayrlhf.tools.report.run_view import read_run

STATE_SECONDS = 10.0
"""Seconds between checks of the run's state."""


class ReplayClock:
    """Monotonic seconds plus skipped time, to replay earlier steps with their durations."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._skipped = 0.0

    def __call__(self) -> float:
        """Return seconds."""
        return self._clock() + self._skipped

    def skip(self, seconds: float) -> None:
        """Advance by some seconds."""
        self._skipped += max(0.0, seconds)


def watch_terminal(
    folder: Path,
    *,
    every: float = 2.0,
    once: bool = False,
    console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show a run until it is finished or stopped, or the user interrupts.

    Args:
        every: seconds between updates.
        once: show the current state and return.
        console: output console; standard output when None.
        sleep: function that sleeps for a number of seconds.

    Raises:
        UserError: the folder holds no run.
    """
    run = read_run(folder, max_rollouts=0)
    clock, tail = ReplayClock(), MetricsTail(folder)
    console = console or Console()
    view = LiveView(f"{run.kind}: {run.name}", console=console, clock=clock, stamped=False)
    view.start(run.state.total or run.state.step)
    replayed, looked = True, time.monotonic()
    try:
        while True:
            rows, restarted = tail.read()
            if restarted:
                view.note("the run was rolled back to an earlier step")
            _show(view, clock, rows, replayed=replayed or restarted)
            if replayed or time.monotonic() - looked >= STATE_SECONDS:
                run, looked = read_run(folder, max_rollouts=0), time.monotonic()
                if once or run.state.state in ("finished", "stopped"):
                    view.note(run.state.words())
                    return
            replayed = False
            sleep(every)
    except KeyboardInterrupt:
        return  # the usual way to stop watching
    finally:
        view.stop()


def _show(view: LiveView, clock: ReplayClock, rows: list[Row], *, replayed: bool) -> None:
    """Show the rows of steps; of replayed ones only the last, after skipping their time."""
    steps = [row for row in rows if any(not name.startswith(("evaluation/", "step", "alarm/")) for name in row)]
    for row in steps[:-1] if replayed else []:
        clock.skip(row.get("time/step", 0.0))
        view.replay(int(row["step"]), row)
    for row in steps[-1:] if replayed else steps:
        clock.skip(row.get("time/step", 0.0) if replayed else 0.0)
        view.step(int(row["step"]), row)
