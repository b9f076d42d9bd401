"""A run on the terminal of somebody else: the panel that the driver shows, fed from the run folder.

The folder is only read, so it may lie on storage that the run's machine shares with this one.
"""

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from rayrlhf.observe.live import LiveView
from rayrlhf.tools.report.run_files import MetricsTail, Row
from rayrlhf.tools.report.run_view import read_run

STATE_SECONDS = 10.0
"""Time between looks at whether the run still goes."""


class ReplayClock:
    """Steady seconds, plus what was skipped."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._skipped = 0.0

    def __call__(self) -> float:
        """Return seconds."""
        return self._clock() + self._skipped

    def skip(self, seconds: float) -> None:
        """Move on by some seconds."""
        self._skipped += max(0.0, seconds)


def watch_terminal(
    folder: Path,
    *,
    every: float = 2.0,
    once: bool = False,
    console: Console | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show a run until it is finished or left, or the user interrupts.

    Args:
        folder: the run folder.
        every: seconds between looks.
        once: show the present state and return.
        console: where to; standard output when None.
        sleep: waits so many seconds.

    Raises:
        UserError: the folder holds no run.
    """
    run = read_run(folder, max_rollouts=0)
    clock, tail = ReplayClock(), MetricsTail(folder)
    console = console or Console()
    view = LiveView(f"{run.kind}: {run.name}", console=console, clock=clock)
    view.start(run.state.total or run.state.step)
    replayed, looked = True, time.monotonic()
    try:
        while True:
            rows, restarted = tail.read()
            if restarted:
                view.note("the run went back to an earlier step")
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
    """Feed the rows of steps; of those from before anybody watched, the clock passes over the time and the last is shown."""
    steps = [row for row in rows if any(not name.startswith(("evaluation/", "step", "alarm/")) for name in row)]
    for row in steps[:-1] if replayed else []:
        clock.skip(row.get("time/step", 0.0))
        view.replay(int(row["step"]), row)
    for row in steps[-1:] if replayed else steps:
        clock.skip(row.get("time/step", 0.0) if replayed else 0.0)
        view.step(int(row["step"]), row)
