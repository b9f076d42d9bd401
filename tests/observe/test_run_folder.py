"""The run folder: create, resume, refuse, lock."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError
from rayrlhf.observe.run_folder import RunFolder, check_run_folder, open_run


def line_differences(old: str, new: str) -> list[str]:
    pairs = zip(old.splitlines(), new.splitlines(), strict=True)
    return [f"{a} -> {b}" for a, b in pairs if a.strip() != b.strip()]


def open_and_close(folder: Path, text: str = "a: 1\nb: 2\n", **options: str) -> RunFolder:
    with open_run(folder, text, line_differences, **options) as run:
        return run


def test_a_new_run_gets_its_folder_with_everything_in_place(tmp_path: Path):
    run = open_and_close(tmp_path / "runs" / "first")
    assert not run.resumed
    assert run.config.read_text() == "a: 1\nb: 2\n"
    assert all(folder.is_dir() for folder in (run.tensorboard, run.samples, run.checkpoints))
    assert not run.export.exists()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]


def test_the_same_configuration_resumes_also_when_only_its_spelling_changed(tmp_path: Path):
    open_and_close(tmp_path / "run")
    assert open_and_close(tmp_path / "run").resumed
    assert open_and_close(tmp_path / "run", "a: 1 \n b: 2\n").resumed


def begun(folder: Path, text: str = "a: 1\nb: 2\n") -> Path:
    """A run with one step."""
    (open_and_close(folder, text).path / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def test_another_configuration_is_refused_with_what_differs(tmp_path: Path):
    begun(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        open_and_close(tmp_path / "run", "a: 1\nb: 3\n")
    assert "another configuration (b: 2 -> b: 3): choose another run.name" in str(caught.value)


def test_the_weights_of_another_configuration_are_offered_for_a_new_run(tmp_path: Path):
    open_and_close(tmp_path / "run")
    (tmp_path / "run" / "export").mkdir()
    with pytest.raises(UserError, match=r"another run\.name, with --from .*/run to begin with its weights$"):
        open_and_close(tmp_path / "run", "a: 1\nb: 3\n")


def test_a_run_that_failed_before_its_first_step_does_not_block_its_name(tmp_path: Path):
    folder = open_and_close(tmp_path / "run").path
    (folder / "metrics.jsonl").write_text('{"step": 0, "evaluation/score": 1.0}\n')
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "step-000000.parquet").touch()
    run = open_and_close(folder, "a: 1\nb: 3\n")
    assert not run.resumed
    assert run.config.read_text() == "a: 1\nb: 3\n"
    assert not (folder / "evaluation").exists(), "an evaluation of another configuration"
    assert run.checkpoints.is_dir()


@pytest.mark.parametrize("kept", ["metrics.jsonl", "checkpoints/train/step-000001/part", "export/config.json"])
def test_a_run_with_a_step_a_checkpoint_or_a_model_keeps_its_configuration(tmp_path: Path, kept: str):
    folder = open_and_close(tmp_path / "run").path
    (folder / kept).parent.mkdir(parents=True, exist_ok=True)
    (folder / kept).write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="another configuration"):
        open_and_close(folder, "a: 1\nb: 3\n")
    assert (folder / kept).exists()


def test_a_folder_of_another_kind_keeps_its_configuration_from_the_start(tmp_path: Path):
    open_and_close(tmp_path / "run", folders=())
    with pytest.raises(UserError, match="another configuration"):
        open_and_close(tmp_path / "run", "a: 1\nb: 3\n", folders=())


def test_a_run_of_another_kind_is_one_line(tmp_path: Path):
    begun(tmp_path / "run")
    with pytest.raises(UserError, match=r"choose another run\.name, for example if another kind of run has this one"):
        check_run_folder(tmp_path / "run", "a: 1\n", lambda *_: ModelSection.model_validate({"a": 1}))


def test_a_check_creates_nothing_and_finds_what_the_run_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert not check_run_folder(tmp_path / "runs" / "new", "a: 1\n", line_differences)
    assert not list(tmp_path.iterdir())
    open_and_close(tmp_path / "run", "a: 1\n")
    assert check_run_folder(tmp_path / "run", "a: 1\n", line_differences)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match=r"cannot write .*runs/new: Permission denied"):
        check_run_folder(tmp_path / "runs" / "new", "a: 1\n", line_differences)


def test_a_long_list_of_differences_is_cut(tmp_path: Path):
    begun(tmp_path / "run", "".join(f"k{n}: 0\n" for n in range(9)))
    with pytest.raises(UserError, match=r"k4: 0 -> k4: 1; and 4 more\)") as caught:
        open_and_close(tmp_path / "run", "".join(f"k{n}: 1\n" for n in range(9)))
    assert "\n" not in str(caught.value)


def test_never_resuming_refuses_a_folder_that_holds_a_run(tmp_path: Path):
    open_and_close(tmp_path / "run", resume="never")
    with pytest.raises(UserError, match=r"run\.resume is 'never'"):
        open_and_close(tmp_path / "run", resume="never")


def test_an_empty_folder_is_used_and_one_with_other_files_is_not(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert not open_and_close(tmp_path / "empty").resumed
    assert open_and_close(tmp_path / "empty").resumed
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"has files in it but no config\.yaml"):
        open_and_close(tmp_path / "full")


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*run: Not a directory \(.*/file\)"):
        open_and_close(tmp_path / "file" / "run")


HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom rayrlhf.observe.run_folder import open_run\n"
    "run = open_run(Path(sys.argv[1]), 'a: 1\\nb: 2\\n', lambda a, b: [])\nprint('open', flush=True)\ntime.sleep(60)\n"
)


def test_a_running_driver_keeps_others_out_until_it_ends_even_by_a_kill(tmp_path: Path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=rf"is in use by another process \(pid {holder.pid} on .+\)"):
            open_and_close(tmp_path / "run")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert open_and_close(tmp_path / "run").resumed
