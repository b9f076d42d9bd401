"""Atomic files and folders: whole or not at all, also when the writer fails, races, or is killed."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from rayrlhf.storage.atomic import file_atomically, folder_atomically, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path: Path):
    target = tmp_path / "a.txt"
    write_atomically(target, "größer")
    write_atomically(target, b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a.txt"]


def test_a_failing_writer_leaves_the_old_file_and_no_rest(tmp_path: Path):
    target = tmp_path / "a.txt"
    write_atomically(target, "old")
    with pytest.raises(TypeError), file_atomically(target) as partial:
        _ = partial.write_text("half") + "a mistake"
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_failing_folder_leaves_nothing(tmp_path: Path):
    with pytest.raises(TypeError), folder_atomically(tmp_path / "deep" / "folder") as partial:
        _ = (partial / "x").write_text("half") + "a mistake"
    assert names(tmp_path / "deep") == []


def test_a_folder_appears_only_at_the_end_with_everything_in_it(tmp_path: Path):
    target = tmp_path / "checkpoint"
    with folder_atomically(target) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "weights").write_bytes(b"1234")
        assert not target.exists()
    assert (target / "inner" / "weights").read_bytes() == b"1234"
    assert names(tmp_path) == ["checkpoint"]


def test_an_existing_folder_is_an_error_unless_replaced_or_kept(tmp_path: Path):
    target = tmp_path / "folder"
    for content in ("first", "second"):
        with folder_atomically(target, if_exists="replace") as partial:
            (partial / content).touch()
        assert names(target) == [content]
    with pytest.raises(FileExistsError), folder_atomically(target):
        pytest.fail("the block must not run")
    with folder_atomically(target, if_exists="keep") as partial:
        (partial / "third").touch()
    assert names(target) == ["second"]
    assert names(tmp_path) == ["folder"]


def test_a_folder_that_appears_meanwhile_is_an_error(tmp_path: Path):
    target = tmp_path / "folder"
    other = target / "other"
    with pytest.raises(FileExistsError), folder_atomically(target):
        other.mkdir(parents=True)
    assert names(target) == ["other"]
    assert names(tmp_path) == ["folder"]


def test_racing_makers_of_a_kept_folder_agree_on_one(tmp_path: Path):
    target = tmp_path / "cache"
    barrier = threading.Barrier(8)
    failures = []

    def make(number: int) -> None:
        try:
            with folder_atomically(target, if_exists="keep") as partial:
                (partial / f"from-{number}").touch()
                barrier.wait(timeout=20)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=make, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(names(target)) == 1
    assert names(tmp_path) == ["cache"]


@pytest.mark.parametrize("write", ["file_atomically(path)", "folder_atomically(path, if_exists='replace')"])
def test_a_killed_writer_leaves_the_old_content(tmp_path: Path, write: str):
    target = tmp_path / "thing"
    if "folder" in write:
        target.mkdir()
        (target / "old").touch()
    else:
        target.write_text("old")
    script = f"""
        import os, signal, sys
        from pathlib import Path
        from rayrlhf.storage.atomic import file_atomically, folder_atomically
        path = Path(sys.argv[1])
        with {write} as partial:
            (partial / "new" if partial.is_dir() else partial).write_text("new")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(target)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (names(target) == ["old"]) if target.is_dir() else (target.read_text() == "old")


def test_permissions_follow_the_umask(tmp_path: Path):
    old = os.umask(0o022)
    try:
        with folder_atomically(tmp_path / "folder") as partial:
            write_atomically(partial / "file", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "folder" / "file").stat().st_mode & 0o777 == 0o644
