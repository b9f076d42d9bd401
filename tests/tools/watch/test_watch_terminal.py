"""A run followed on the terminal, from its folder alone."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from rayrlhf.errors import UserError
from rayrlhf.observe.metrics import MetricsSink
from rayrlhf.tools.watch import watch_terminal as terminal
from rayrlhf.tools.watch.watch_terminal import ReplayClock, watch_terminal
from tests.tools.report.runs import write_run


def going(folder: Path, steps: int) -> Path:
    """A run of 20 steps that is after its first ones."""
    write_run(folder, steps=20)
    shutil.rmtree(folder / "export")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:steps]))
    return folder


def console() -> Console:
    return Console(file=io.StringIO(), width=200, force_terminal=False)


def text(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def test_the_present_state_is_one_step_and_one_line_with_the_time_to_go(tmp_path: Path):
    shown = console()
    watch_terminal(going(tmp_path / "run", 6), once=True, console=shown)
    step, state = text(shown).splitlines()
    assert step.startswith("step 6/20  score ")
    assert "1m38s left" in step, "14 steps of 7 seconds"
    assert state == "running, at step 6 of 20"


def test_new_steps_are_shown_as_they_come_until_the_run_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, shown, waits = going(tmp_path / "run", 6), console(), []
    monkeypatch.setattr(terminal, "STATE_SECONDS", 0.0)
    sink = MetricsSink(folder)

    def next_step(seconds: float) -> None:
        waits.append(seconds)
        sink.write(6 + len(waits), {"objective/scores": 0.5, "time/step": 7.0})

    watch_terminal(folder, every=3.0, console=shown, sleep=next_step)
    lines = text(shown).splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [f"{step}/20" for step in range(6, 21)]
    assert lines[-1] == "finished after 20 steps"
    assert waits == [3.0] * 14


def test_a_run_that_goes_back_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, shown, waits = going(tmp_path / "run", 6), console(), []
    monkeypatch.setattr(terminal, "STATE_SECONDS", 0.0)
    sink = MetricsSink(folder)

    def rewound(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 1:
            sink.rewind(2)
        sink.write(20 if len(waits) > 1 else 3, {"objective/scores": 0.5})

    watch_terminal(folder, console=shown, sleep=rewound)
    assert "the run was rolled back to an earlier step" in text(shown)
    assert "step 3/20" in text(shown)


def test_an_interrupt_ends_watching_quietly(tmp_path: Path):
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    watch_terminal(going(tmp_path / "run", 6), console=console(), sleep=interrupted)


def test_watching_leaves_the_folder_as_it_was(tmp_path: Path):
    folder = going(tmp_path / "run", 6)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}
    watch_terminal(folder, once=True, console=console())
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))} == before


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no run here"):
        watch_terminal(tmp_path, once=True)


def test_the_clock_passes_over_what_was_skipped_and_never_goes_back():
    clock = ReplayClock(lambda: 10.0)
    clock.skip(5.0)
    clock.skip(-3.0)
    assert clock() == 15.0
