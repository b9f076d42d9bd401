"""Findings on the page of a run."""

from pathlib import Path

import pytest

from rayrlhf.observe.diagnostics import Finding
from rayrlhf.observe.html.page import DataTable
from rayrlhf.tools.report import run_page
from rayrlhf.tools.report.metric_series import Series
from rayrlhf.tools.report.run_blocks import Notice
from rayrlhf.tools.report.run_state import RunState
from rayrlhf.tools.report.run_view import RunView


def view(kind: str = "PPO", **series: Series) -> RunView:
    named = {name.replace("__", "/"): values for name, values in series.items()}
    return RunView(Path(), kind, RunState("finished", 9, 9), rows=[{"step": 1.0}], series=named)


def test_a_finding_is_told_with_its_evidence_and_remedy(monkeypatch: pytest.MonkeyPatch):
    found = Finding("kl_blow_up", "alarm", 7, "KL rose from 1 to 90 nats", "Lower the learning rate.")
    monkeypatch.setattr(run_page, "findings", lambda rows: [found])
    notice = list(run_page.findings_section(view()))[1]
    assert notice == Notice("bad", "Kl blow up, since step 7", ["KL rose from 1 to 90 nats.", "Lower the learning rate."])


def test_a_sound_run_says_so_and_findings_that_went_away_are_listed_with_their_steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_page, "findings", lambda rows: [])
    blocks = list(
        run_page.findings_section(view(alarm__dead_reward=Series([3, 4, 5, 6], [1, 0, 1, 0]), other=Series([1], [1])))
    )
    assert isinstance(blocks[1], Notice)
    assert blocks[1].kind == "good"
    assert isinstance(blocks[-1], DataTable)
    assert blocks[-1].rows == [("dead reward", 2, 3, 5)]


def test_checks_of_ppo_say_nothing_of_other_runs():
    assert list(run_page.findings_section(view("SFT"))) == []
