"""Limits of the system are one line before Ray starts; a disk that is full later is one line too."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError
from safetensors import SafetensorError

from rayrlhf.actors.waiting import _raise_cause
from rayrlhf.errors import UserError
from rayrlhf.observe import host_limits
from rayrlhf.observe.host_limits import LONGEST_FOLDER, check_free_space, check_host_limits
from rayrlhf.observe.trackers import TensorBoardSink
from rayrlhf.storage.atomic import full_disk, writing
from rayrlhf.tuning import tuning_loop
from rayrlhf.tuning.refusal import raise_refusal
from rayrlhf.tuning.train_model import _lost

NO_SPACE = os.strerror(errno.ENOSPC)
CHECK = "from rayrlhf.actors.connection import connected\nwith connected('local'): print('started')"


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("-n 500", "ulimit -n: 500 open files, expected at least 1024"),
        ("-f 2000", "ulimit -f: files of at most 2.0 MiB, expected unlimited: Ray's object store is a file of"),
    ],
)
def test_a_limit_of_the_shell_is_one_line_before_ray_starts(limit, said):
    shell = f'ulimit {limit}; exec {sys.executable} -c "{CHECK}"'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == ""
    assert f"rayrlhf.errors.UserError: {said}" in done.stderr.splitlines()[-1]


def test_a_low_soft_limit_is_raised():
    script = "import resource; from rayrlhf.observe.host_limits import check_host_limits; check_host_limits()"
    shell = f"ulimit -S -n 200; ulimit -S -f 10; exec {sys.executable} -c '{script}; print(resource.getrlimit(7)[0])'"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) >= 1024


def test_a_small_temporary_folder_and_one_with_a_long_path_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/t" + "x" * LONGEST_FOLDER)
    with pytest.raises(UserError, match="the path is too long for the sockets in it"):
        check_host_limits()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/small")
    monkeypatch.setattr(host_limits.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match=r"/tmp/small: 1\.0 MiB free, expected at least 64 MiB for Ray's logs; free some"):
        check_host_limits()
    with pytest.raises(UserError, match=r"1\.0 MiB free, expected at least 3 MiB for the model"):
        check_free_space(tmp_path / "not" / "there", 3 * 2**20, "the model", "free some")


def test_the_longest_folder_is_rays():
    from ray._private.utils import validate_socket_filepath

    name = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
    validate_socket_filepath("/" + "x" * (LONGEST_FOLDER - 1) + name)
    with pytest.raises(Exception, match="AF_UNIX"):
        validate_socket_filepath("/" + "x" * LONGEST_FOLDER + name)


FULL = [
    OSError(errno.ENOSPC, NO_SPACE, "/runs/x"),
    OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
    SafetensorError(f"Error while serializing: IoError(Os {{ code: 28, kind: StorageFull, message: {NO_SPACE!r} }})"),
    RuntimeError(f"[enforce fail at inline_container.cc] PytorchStreamWriter failed: {NO_SPACE}"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_one_line_wherever_and_by_whichever_library_it_is_met(error, tmp_path, monkeypatch):
    reason = os.strerror(getattr(error, "errno", None) or errno.ENOSPC)
    with pytest.raises(UserError, match=f"cannot write /runs/y: {reason}"), writing(Path("/runs/y")):
        raise error
    with pytest.raises(UserError, match=f"ppo/policy/0: export: {reason}.*; free some space, then the same command resumes"):
        _raise_cause(RayTaskError("export", "", error), "export", "ppo/policy/0")

    def fails(*_):
        raise error

    monkeypatch.setattr(tuning_loop, "_Worker", fails)
    monkeypatch.setattr(tuning_loop, "leave", lambda: None)
    tuning_loop.train_loop({"job": SimpleNamespace(folder=tmp_path)})
    with pytest.raises(UserError, match=f"{reason}.*; free some space, then the same command resumes"):
        raise_refusal(tmp_path)
    lost = _lost(SimpleNamespace(worker_failures={0: RayTaskError("run", "", error)}), 3)
    assert isinstance(lost, UserError)
    assert reason in str(lost)


def test_other_errors_stay_what_they_are():
    assert full_disk(ValueError("no space between words")) == ""
    with pytest.raises(ValueError, match="a bug"), writing(Path("/runs/y")):
        raise ValueError("a bug")


def test_a_disk_that_fills_before_tensorboard_closes_is_one_line(tmp_path, monkeypatch):
    sink = TensorBoardSink(tmp_path)
    close = sink._writer.close

    def full():
        close()
        raise OSError(errno.ENOSPC, NO_SPACE)

    monkeypatch.setattr(sink._writer, "close", full)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}: {NO_SPACE}"):
        sink.close()
