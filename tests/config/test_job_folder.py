"""Results of a Ray job lie where they outlive it, although Ray deletes the job's working directory."""

import subprocess
import sys
from pathlib import Path

from rayrlhf.config.model import ModelSection
from rayrlhf.config.section import FolderSection
from rayrlhf.models.model_path import resolve_path


def test_a_relative_root_of_a_job_is_below_a_folder_that_remains(tmp_path, monkeypatch):
    unpacked = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_1"
    unpacked.mkdir(parents=True)
    section = FolderSection(name="job")
    assert section.folder == Path("runs/job")
    monkeypatch.chdir(unpacked)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert section.folder == tmp_path / "rayrlhf-jobs/runs/job"
    monkeypatch.setenv("RAYRLHF_JOB_RUNS", str(tmp_path / "kept"))
    assert section.folder == tmp_path / "kept/runs/job"
    assert FolderSection(name="job", root=tmp_path).folder == tmp_path / "job"
    export = section.folder / "export"
    export.mkdir(parents=True)
    (export / "config.json").touch()
    assert resolve_path(ModelSection(path="runs/job/export")) == str(export), "a later job begins with its model"


def test_every_command_of_a_job_says_where_results_are(tmp_path):
    unpacked = tmp_path / "working_dir_files/_ray_pkg_1"
    unpacked.mkdir(parents=True)
    command = [sys.executable, "-m", "rayrlhf.cli", "report", "runs/none"]
    found = subprocess.run(
        command, cwd=unpacked, env={"RAYRLHF_JOB_RUNS": "/kept", "HOME": "/"}, capture_output=True, text=True, timeout=60
    )
    assert "a relative run.root is below /kept, because" in found.stderr
