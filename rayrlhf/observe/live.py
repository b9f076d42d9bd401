"""Terminal view of a run: a live panel, or one plain line per step.

Both show the same `Progress`. A wait shows its reason and duration: as a spinner on a terminal, else as a line every
`heartbeat_seconds`, so that a log is never silent. The phase of a step is shown in the same way, in a log for the first step
only. Lines of a log begin with the time of day.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rayrlhf.observe.progress import Progress, duration, sparkline
from rayrlhf.observe.text_table import printable

PHASE_COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red")
SPARKLINE_WIDTH = 24
PHASE_BAR_WIDTH = 40
SILENT_SECONDS = 1.0
"""Waits up to this time leave no line in a log."""


class LiveView:
    """Shows a run: `start`, `phase` and `step` of each step, `note` and `wait` anytime, `stop`."""

    def __init__(
        self,
        title: str = "rayrlhf",
        *,
        console: Console | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        heartbeat_seconds: float = 30.0,
        stamped: bool = True,
    ) -> None:
        """Prepare; nothing is shown yet.

        Args:
            console: output console; standard output when None.
            live: update in place; None for a terminal only.
            clock: monotonic seconds.
            heartbeat_seconds: time between the lines of a long wait without a terminal.
            stamped: begin lines of a log with the time of day; False where lines are of an earlier time.
        """
        self._title = title
        self._console = console or Console()
        self._live_wanted = self._console.is_terminal if live is None else live
        self._clock = clock
        self._heartbeat = heartbeat_seconds
        self._stamped = stamped
        self._progress: Progress | None = None
        self._waits: list[tuple[Spinner, str, float]] = []
        self._phases: list[tuple[Spinner, str, float]] = []
        self._phase_lines = ExitStack()
        self._first = True
        self._live: Live | None = None

    def start(self, total: int, step: int = 0) -> None:
        """Show the run; `step` is the last completed step of a resumed run."""
        self._progress = Progress(total, step)
        self._progress.start(self._clock())
        self._update()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step; the names of the metrics shown are `rayrlhf.observe.progress.SHOWN`."""
        progress = self._progress
        if progress is None:
            raise RuntimeError("step() before start()")
        progress.finish_step(step, metrics, self._clock())
        self._first = False
        self.phase("")
        if self._live_wanted:
            self._update()
        else:
            self.note(progress.line(self._clock()))

    def phase(self, name: str) -> None:
        """Show the phase of the step in progress; "" ends it."""
        self._phase_lines.close()
        self._phases.clear()
        if not name or self._progress is None:
            return
        text = f"step {self._progress.step + 1}: {name}"
        if self._live_wanted:
            self._phases.append((Spinner("dots"), text, self._clock()))
            self._update()
        elif self._first:
            self._phase_lines.enter_context(self._heartbeats(text))

    def replay(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record an earlier step without showing it; the next output includes it."""
        if self._progress is None:
            raise RuntimeError("replay() before start()")
        self._progress.finish_step(step, metrics, self._clock())

    def note(self, text: str) -> None:
        """Print a line that stays, above the panel."""
        clock = "" if self._console.is_terminal or not self._stamped else time.strftime("%H:%M:%S ")
        self._console.print(Text(clock + printable(text)), soft_wrap=True)

    @contextmanager
    def wait(self, text: str) -> Iterator[None]:
        """Show the reason and duration of a wait until the block ends; may be nested."""
        if not self._live_wanted:
            with self._heartbeats(text):
                yield
            return
        entry = (Spinner("dots"), text, self._clock())
        self._waits.append(entry)
        self._update()
        try:
            yield
        finally:
            self._waits.remove(entry)
            if self._progress is None and not self._waits:
                self.stop()
            else:
                self._update()

    def stop(self) -> None:
        """Stop updating; the panel's last state stays on the terminal. Idempotent."""
        self.phase("")
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [] if self._progress is None else [self._panel(self._progress)]
        for spinner, text, since in [*self._phases, *self._waits]:
            row = Table.grid(padding=(0, 1))
            row.add_row(spinner, Text(printable(text)), Text(duration(self._clock() - since), style="dim"))
            parts.append(row)
        return Group(*parts)

    def _panel(self, progress: Progress) -> Panel:
        left = progress.seconds_left(self._clock())
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        head.add_row(
            Text(f"step {progress.step}/{progress.total}", style="bold"),
            ProgressBar(total=max(1, progress.total), completed=progress.step),
            Text(f"{duration(left)} left" if left is not None else ""),
        )
        numbers = Text("   ").join(Text.assemble((f"{label} ", "dim"), (value, "bold")) for label, value in progress.numbers())
        reward = Text.assemble(("score ", "dim"), (sparkline(progress.scores, SPARKLINE_WIDTH), "green"))
        return Panel(Group(head, numbers, reward, *_phase_rows(progress)), title=Text(printable(self._title)), expand=True)

    def _update(self) -> None:
        if not self._live_wanted:
            return
        if self._live is None:
            # A run's panel stays on the terminal; a spinner alone is removed.
            self._live = Live(self, console=self._console, refresh_per_second=4, transient=self._progress is None)
            self._live.start(refresh=True)
        self._live.transient = self._progress is None
        self._live.refresh()

    @contextmanager
    def _heartbeats(self, text: str) -> Iterator[None]:
        since, done, begun = self._clock(), threading.Event(), False

        def beat() -> None:
            nonlocal begun
            if done.wait(min(SILENT_SECONDS, self._heartbeat)):
                return
            begun = True
            self.note(f"{text} ...")
            while not done.wait(self._heartbeat):
                self.note(f"{text}: still waiting after {duration(self._clock() - since)}")

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        ended = "failed"
        try:
            yield
            ended = "done"
        finally:
            done.set()
            thread.join()
            if begun or ended == "failed":
                self.note(f"{text}: {ended} after {duration(self._clock() - since)}")


def _phase_rows(progress: Progress) -> list[Text]:
    """Draw a bar of the step's phases, and its legend."""
    shares = progress.shares()
    if not shares:
        return []
    total = max(1.0, sum(share for _, share in shares))  # overlapping phases add up to more than the step
    bar, legend = Text(), Text()
    for index, (name, share) in enumerate(shares):
        color = "bright_black" if name == "other" else PHASE_COLORS[index % len(PHASE_COLORS)]
        bar.append("█" * round(PHASE_BAR_WIDTH * share / total), style=color)
        legend.append(f"■ {name} {share:.0%}  ", style=color)
    return [bar, legend]
