"""The run folder: create, resume, refuse, lock."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rayrlhf.errors import UserError
from rayrlhf.observe.run_folder import RunFolder, open_run


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


def test_another_configuration_is_refused_with_what_differs(tmp_path: Path):
    open_and_close(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        open_and_close(tmp_path / "run", "a: 1\nb: 3\n")
    assert "another configuration (b: 2 -> b: 3): choose another run.name" in str(caught.value)


def test_a_long_list_of_differences_is_cut(tmp_path: Path):
    open_and_close(tmp_path / "run", "".join(f"k{n}: 0\n" for n in range(9)))
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
    with pytest.raises(UserError, match=r"cannot write .*run: File exists \(.*/file\)"):
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
