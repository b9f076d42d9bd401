"""The terminal view on real consoles: one that is a terminal and one that is a file."""

import io
import re
import threading
import time

import pytest
from rich.console import Console

from rayrlhf.observe.live import LiveView

METRICS = {
    "objective/scores": 0.5,
    "objective/kl": 0.012,
    "policy/entropy_avg": 1.25,
    "tokens/responses_len_mean": 40.0,
    "speed/tokens_per_second": 123.0,
    "time_share/generate": 0.5,
    "time_share/update": 0.4,
    "time_share/other": 0.1,
}


def terminal() -> Console:
    return Console(record=True, width=100, height=30, file=io.StringIO(), force_terminal=True)


def pipe() -> Console:
    return Console(width=80, file=io.StringIO(), force_terminal=False)


def text_of(console: Console) -> str:
    return console.file.getvalue()


def log_of(console: Console) -> list[str]:
    """The lines of a log without their time of day."""
    return [re.fullmatch(r"\d\d:\d\d:\d\d (.*)", line)[1] for line in text_of(console).splitlines()]


def test_without_a_terminal_each_step_is_one_line_without_escapes():
    console = pipe()
    view = LiveView(console=console)
    view.start(total=3)
    for step in (1, 2, 3):
        view.step(step, METRICS)
    view.note("checkpoint written")
    view.stop()
    lines = log_of(console)
    assert len(lines) == 4
    assert lines[0].startswith("step 1/3  score 0.500  KL 0.012  entropy 1.250  length 40  tok/s 123  generate 50%")
    assert lines[-1] == "checkpoint written"
    assert "\x1b" not in text_of(console)


def test_on_a_terminal_the_panel_shows_numbers_phases_and_the_score_over_time():
    console = terminal()
    view = LiveView("my run", console=console)
    view.start(total=8)
    for step in range(1, 5):
        view.step(step, {**METRICS, "objective/scores": step / 10})
    view.stop()
    console.print(view)
    text = console.export_text()
    for part in (
        "my run",
        "step 4/8",
        "score 0.400",
        "KL 0.012",
        "entropy 1.250",
        "tok/s 123",
        "▁▃▆█",
        "generate 50%",
        "left",
        "█████",
    ):
        assert part in text, part


def test_a_step_without_some_numbers_shows_the_others():
    console = terminal()
    view = LiveView(console=console)
    view.start(total=2)
    view.step(1, {"objective/scores": 0.25})
    view.stop()
    console.print(view)
    assert "score 0.250" in console.export_text()


def test_hostile_titles_and_notes_are_shown_and_not_obeyed():
    for console in (terminal(), pipe()):
        view = LiveView("[bold]run[/]", console=console)
        view.start(total=1)
        view.note("[red]x[/red] \x1b[2J")
        view.step(1, METRICS)
        view.stop()
        assert "[red]x[/red] \\x1b[2J" in text_of(console)
        assert "\x1b[2J" not in text_of(console)


def test_a_wait_on_a_terminal_shows_what_and_how_long_and_goes_away():
    now = [0.0]
    console = terminal()
    view = LiveView(console=console, clock=lambda: now[0])
    with view.wait("starting the actors"):
        now[0] = 65.0
        time.sleep(0.4)
    assert "starting the actors" in text_of(console)
    assert "1m05s" in text_of(console)
    console.print(view)
    assert text_of(console).count("starting the actors") >= 1
    deadline = time.monotonic() + 5
    while any("Refresh" in type(thread).__name__ for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_waits_nest_and_leave_the_panel_running():
    console = terminal()
    view = LiveView(console=console)
    view.start(total=2)
    with view.wait("outer wait"), view.wait("inner wait"):
        pass
    view.step(1, METRICS)
    view.stop()
    view.stop()
    assert "outer wait" in text_of(console)
    assert "inner wait" in text_of(console)
    assert "step 1/2" in text_of(console)


def test_a_long_wait_without_a_terminal_never_falls_silent():
    console = pipe()
    view = LiveView(console=console, heartbeat_seconds=0.05)
    with view.wait("loading"):
        time.sleep(0.4)
    lines = log_of(console)
    assert lines[0] == "loading ..."
    assert lines[1].startswith("loading: still waiting after ")
    assert lines[-1].startswith("loading: done after ")
    assert len(lines) >= 4


def test_a_wait_that_fails_says_so_and_lets_the_error_through():
    console = pipe()

    def fail() -> None:
        with LiveView(console=console).wait("loading"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert log_of(console)[-1].startswith("loading: failed after ")


def test_a_wait_of_less_than_a_second_leaves_no_line():
    console = pipe()
    with LiveView(console=console).wait("looking for a checkpoint"):
        pass
    assert log_of(console) == []


def test_the_view_survives_a_terminal_that_is_too_narrow():
    console = Console(record=True, width=12, height=5, file=io.StringIO(), force_terminal=True)
    view = LiveView(console=console)
    view.start(total=1)
    view.step(1, METRICS)
    view.stop()
    assert "step" in text_of(console)


def test_the_phases_of_the_first_step_are_lines_of_a_log_and_those_of_later_ones_are_not():
    console = pipe()
    view = LiveView(console=console, heartbeat_seconds=0.05)
    view.phase("evaluate")
    view.start(total=2, step=3)
    for step in (4, 5):
        view.phase("generate")
        time.sleep(0.12)
        view.phase("")
        view.step(step, METRICS)
    lines = log_of(console)
    assert lines[0] == "step 4: generate ..."
    assert [line for line in lines if "generate: done after" in line] == ["step 4: generate: done after 0s"]
    assert not any(line.startswith("step 5: ") for line in lines)


def test_a_terminal_shows_the_phase_of_every_step_until_it_ends():
    now = [0.0]
    console = terminal()
    view = LiveView(console=console, clock=lambda: now[0])
    view.start(total=2)
    view.step(1, METRICS)
    view.phase("update_policy")
    now[0] = 65.0
    time.sleep(0.4)
    assert "step 2: update_policy 1m05s" in re.sub(r"\x1b\[[\d;?]*\w", "", text_of(console))
    view.stop()
    console.print(view)
    assert "update_policy" not in console.export_text().rpartition("step 1/2")[2]
