"""`rayrlhf watch`: on the terminal and as a page."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rayrlhf.cli import app
from rayrlhf.tools.watch.watch_server import RunServer
from tests.tools.report.runs import write_run


def test_the_command_shows_the_present_state_once(tmp_path: Path):
    result = CliRunner().invoke(app, ["watch", str(write_run(tmp_path / "run")), "--once", "--every", "0.5"])
    assert result.exit_code == 0, result.output
    assert "step 20/20" in result.output
    assert "finished after 20 steps" in result.output


def test_the_command_tells_the_address_once_and_ends_on_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    served: list[RunServer] = []

    def interrupted(server: RunServer) -> None:
        served.append(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunServer, "serve_forever", interrupted)
    result = CliRunner().invoke(app, ["watch", str(write_run(tmp_path / "run")), "--serve", "--port", "0"])
    assert result.exit_code == 0, result.output
    assert result.output.count(served[0].address) == result.output.count(served[0].token) == 1
