"""Run folders: layout, configuration check, and exclusive lock.

A folder belongs to one resolved configuration. Starting the same configuration again continues the run; another one is
rejected with the keys that differ, because mixing two runs in one folder would make both worthless. If a training run failed
before its first step, another configuration may replace it. A running driver holds a lock, which the system releases at the
end of the process.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from rayrlhf.errors import UserError
from rayrlhf.observe.host_facts import write_environment
from rayrlhf.observe.library_warnings import LIBRARY_WARNINGS
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.storage.atomic import folder_atomically, write_atomically, writing
from rayrlhf.storage.notes import reading

Differences = Callable[[str, str], list[str]]
"""(stored config text, new config text) -> one line per key that differs; empty when both mean the same."""

MAX_DIFFERENCES_SHOWN = 5
TRAINING_FOLDERS = ("tensorboard", "samples", "checkpoints")
"""Subfolders of a new training run."""
_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder locked by this process until `close`; a context manager.

    Attributes:
        path: the folder.
        resumed: True if it existed, with the same configuration.
    """

    path: Path
    resumed: bool
    _lock: IO[str] = field(repr=False)

    @property
    def config(self) -> Path:
        """`config.yaml`, the resolved configuration."""
        return self.path / "config.yaml"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        """Folder of sampled responses, `rayrlhf.observe.samples`."""
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The trained model in Hugging Face format; exists once the run is complete."""
        return self.path / "export"

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_run(
    folder: Path,
    config_text: str,
    differences: Differences,
    *,
    resume: Literal["auto", "never"] = "auto",
    folders: Sequence[str] = TRAINING_FOLDERS,
) -> RunFolder:
    """Create a run folder, or resume the run in it.

    Args:
        folder: path; missing parents are created.
        config_text: the resolved configuration as YAML.
        differences: compares it with the stored one, see `Differences`.
        resume: `never` rejects a folder that holds a run.
        folders: subfolders of a new run folder.

    Raises:
        UserError: as `check_run_folder`; also, a process is using the folder, or the disk is full or read-only.
    """
    config = folder / "config.yaml"
    exists = config.exists()
    begins = not check_run_folder(folder, config_text, differences, resume=resume, folders=folders)
    with writing(folder):
        if not exists:
            _create(folder, config_text, folders)
        lock = _locked(folder)
        if exists and begins:
            _empty(folder)
            _fill(folder, config_text, folders)
        elif config.read_text(encoding="utf-8") != config_text:
            write_atomically(config, config_text)  # update the settings that may differ
        write_environment(folder)
        LIBRARY_WARNINGS.write_to(folder)
        return RunFolder(folder, not begins, lock)


def check_run_folder(
    folder: Path,
    config_text: str,
    differences: Differences,
    *,
    resume: Literal["auto", "never"] = "auto",
    folders: Sequence[str] = TRAINING_FOLDERS,
) -> bool:
    """Return True if a configuration would continue the run of a folder; arguments as `open_run`.

    Raises:
        UserError: the folder holds another configuration, or other files and no run; it cannot be written; resuming is
            switched off.
    """
    config = folder / "config.yaml"
    if not config.exists():
        _check_can_create(folder)
        return False
    if resume == "never":
        raise UserError(f"run folder {folder} holds a run and run.resume is 'never': choose another run.name, or remove it")
    with reading(config, "restore it, or choose another run.name, for example if another kind of run has this one"):
        stored = config.read_text(encoding="utf-8")
        found = differences(stored, config_text) if stored != config_text else []
    if not found:
        return True
    if folders and _failed_at_start(folder):
        return False
    more = len(found) - MAX_DIFFERENCES_SHOWN
    shown = "; ".join(found[:MAX_DIFFERENCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    weights = f", with --from {folder} to begin with its weights" if (folder / "export").is_dir() else ""
    raise UserError(f"run folder {folder} holds a run with another configuration ({shown}): choose another run.name{weights}")


def _check_can_create(folder: Path) -> None:
    with writing(folder):
        if folder.is_dir():
            if any(folder.iterdir()):
                raise UserError(f"run folder {folder} has files in it but no config.yaml: choose another run.name, or empty it")
            above = folder
        else:
            above = next(parent for parent in folder.absolute().parents if os.path.lexists(parent))
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))


def _failed_at_start(folder: Path) -> bool:
    """Return True for a training run without a step, a checkpoint or a model."""
    begun = any(row["step"] > 0 for row in read_metrics(folder))
    return not begun and not any(folder.glob("checkpoints/**/step-*")) and not (folder / "export").exists()


def _empty(folder: Path) -> None:
    """Remove everything but the lock and the configuration."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (_LOCK, "config.yaml"):
            path.unlink()


def _create(folder: Path, config_text: str, folders: Sequence[str]) -> None:
    """Create an empty run, in place in an existing empty folder (maybe a mount point)."""
    if folder.is_dir():
        _fill(folder, config_text, folders)
        return
    # Two drivers that start at the same time share one folder; the lock then selects one of them.
    with folder_atomically(folder, if_exists="keep") as partial:
        _fill(partial, config_text, folders)


def _fill(folder: Path, config_text: str, folders: Sequence[str]) -> None:
    for name in folders:
        (folder / name).mkdir(exist_ok=True)
    write_atomically(folder / "config.yaml", config_text)  # last: a folder with a config is complete


def _locked(folder: Path) -> IO[str]:
    lock = (folder / _LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise UserError(f"run folder {folder} is in use by another process ({holder}): wait for it, or end it") from None
    except OSError:
        pass  # a network file system without locks: continue without one
    with suppress(OSError):
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
    return lock
