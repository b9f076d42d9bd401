"""Whether a run is finished, going or left."""

import fcntl
from pathlib import Path

import pytest

from rayrlhf.tools.report.run_state import RunState, is_locked, judge


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({"step": 5, "total": 10, "exported": False, "locked": True, "quiet_seconds": 9999.0}, "running"),
        ({"step": 0, "total": 10, "exported": False, "locked": True, "quiet_seconds": None}, "running"),
        ({"step": 10, "total": 10, "exported": False, "locked": False, "quiet_seconds": 1.0}, "finished"),
        ({"step": 7, "total": None, "exported": True, "locked": False, "quiet_seconds": 1.0}, "finished"),
        ({"step": 0, "total": 10, "exported": False, "locked": False, "quiet_seconds": None}, "empty"),
        ({"step": 5, "total": 10, "exported": False, "locked": False, "quiet_seconds": 119.0}, "running"),
        ({"step": 5, "total": 10, "exported": False, "locked": False, "quiet_seconds": 121.0}, "stopped"),
        (
            {"step": 5, "total": 10, "exported": False, "locked": False, "quiet_seconds": 499.0, "step_seconds": 100.0},
            "running",
        ),
        (
            {"step": 5, "total": 10, "exported": False, "locked": False, "quiet_seconds": 501.0, "step_seconds": 100.0},
            "stopped",
        ),
    ],
)
def test_a_runs_state_follows_from_what_its_folder_shows(facts: dict[str, object], state: str):
    assert judge(**{"step_seconds": None, **facts}).state == state  # type: ignore[arg-type]


def test_a_state_is_told_in_words():
    assert RunState("running", 5, 10).words() == "running, at step 5 of 10"
    assert RunState("stopped", 5, None).words() == "not finished, stopped at step 5"


def test_a_lock_is_seen_without_being_touched(tmp_path: Path):
    path = tmp_path / ".lock"
    assert not is_locked(path)
    with path.open("w") as file:
        assert not is_locked(path)
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_locked(path)
    assert not is_locked(path)
