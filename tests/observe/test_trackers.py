"""Each tracker in its own offline mode, read back by its own means; skipped where its package is not installed."""

import math

import pytest

from rayrlhf.errors import UserError
from rayrlhf.observe.trackers import open_tracker

CONFIG = {"model": {"path": "tiny"}, "run": {"steps": 3}}


def write_two_sittings(name):
    """Three steps, the last one in a process that resumes."""
    tracker = open_tracker(name, "first", CONFIG)
    tracker.write(1, {"objective/scores": 0.5, "bad": math.nan})
    tracker.write(2, {"objective/scores": 0.75})
    tracker.close()
    tracker = open_tracker(name, "first", CONFIG)
    tracker.write(3, {"objective/scores": 1.0, "speed/reinforce++": 2})
    tracker.close()


def test_mlflow_holds_every_step_of_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    write_two_sittings("mlflow")
    (run,) = mlflow.search_runs(experiment_names=["rayrlhf"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "objective/scores")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.75), (3, 1.0)]
    assert set(run.data.metrics) == {"objective/scores", "speed/reinforce__"}


def test_wandb_writes_an_offline_run_that_can_be_synced_later(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_two_sittings("wandb")
    files = list(tmp_path.rglob("run-first.wandb"))
    assert files
    assert b"objective/scores" in b"".join(file.read_bytes() for file in files)


def test_trackio_holds_every_step(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    write_two_sittings("trackio")
    rows = SQLiteStorage.get_logs("rayrlhf", "first")
    assert [(row["step"], row["objective/scores"]) for row in rows] == [(1, 0.5), (2, 0.75), (3, 1.0)]


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"observe\.trackers: wandb is not installed; expected `pip install .*trackers"):
        open_tracker("wandb", "run", {})
