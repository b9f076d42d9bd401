"""Atomic writes of files and folders.

Content goes to a hidden sibling first, is flushed to the disk (fsync), and then gets its name by one rename. A reader, or a run
that resumes after a power failure, therefore sees the old content or the new one, never a part of either.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rayrlhf.errors import UserError

TEMPORARY_SUFFIX = ".partial"
"""Suffix of every file and folder that is still being written; leftovers of killed processes may be deleted."""


_FULL = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}


def full_disk(error: BaseException) -> str:
    """Return the system's reason if a full disk caused an error, else an empty string.

    A quota and a limit of file sizes count too. torch and safetensors pass the reason on as text of errors of their own.
    """
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        reason = next((reason for code, reason in _FULL.items() if getattr(seen, "errno", None) == code or reason in text), "")
        if reason:
            named = getattr(seen, "filename", None)
            return f"{reason} ({named})" if named else reason
        cause = getattr(seen, "cause", None)
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    return ""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an `OSError`, or any error about a full disk, to a `UserError`.

    Raises:
        UserError: names the path and the system's reason.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError):
            if reason := full_disk(error):
                raise UserError(f"cannot write {path}: {reason}") from error
            raise
        # Name the cause if it is a parent folder: a file with its name, a read-only mount.
        above = error.filename is not None and Path(error.filename) in path.parents
        raise UserError(f"cannot write {path}: {error.strerror or error}{f' ({error.filename})' if above else ''}") from error


def write_atomically(path: Path | str, content: bytes | str) -> None:
    """Write or replace a file atomically; text is UTF-8.

    Args:
        path: target path; its folder exists.
        content: the whole content.

    Raises:
        OSError: the disk is full or not writable; the older file is then unchanged and no partial file remains.
    """
    with file_atomically(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def file_atomically(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling path, renamed to `path` when the block succeeds.

    Raises:
        OSError: the disk is full or not writable.
    """
    path = Path(path)
    partial = _partial_sibling(path)
    try:
        yield partial
        fsync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def folder_atomically(path: Path | str, *, if_exists: Literal["error", "replace", "keep"] = "error") -> Iterator[Path]:
    """Yield a new empty folder, fsynced and renamed to `path` when the block succeeds.

    Args:
        path: target path; missing parents are created.
        if_exists: if `path` exists at the end, `error` raises, `replace` swaps the old folder out and deletes it (between two
            renames neither exists), `keep` discards the new one, for processes that race to create the same content.

    Raises:
        FileExistsError: `path` exists and `if_exists` is "error".
        OSError: the disk is full or not writable.
    """
    pending = PendingFolder(path, if_exists=if_exists)
    try:
        yield pending.partial
        pending.commit()
    finally:
        pending.discard()


class PendingFolder:
    """A folder under a temporary name until it is committed or discarded.

    Attributes:
        path: final path.
        partial: temporary path.
    """

    def __init__(self, path: Path | str, *, if_exists: Literal["error", "replace", "keep"] = "error") -> None:
        """Create the temporary folder; arguments and errors as in `folder_atomically`."""
        self.path = Path(path)
        self._if_exists = if_exists
        if if_exists == "error" and self.path.exists():
            raise FileExistsError(f"{self.path} exists")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial = _partial_sibling(self.path)
        self.partial.mkdir()

    def commit(self) -> None:
        """Flush the content to the disk and rename the folder to its final path.

        Raises:
            OSError: the disk is full or not writable.
        """
        _open_to_readers(self.partial)
        _fsync_tree(self.partial)
        _take_name(self.partial, self.path, self._if_exists)
        fsync(self.path.parent)

    def discard(self) -> None:
        """Remove an uncommitted folder; no effect after a commit."""
        shutil.rmtree(self.partial, ignore_errors=True)


def remove_leftovers(folder: Path | str) -> int:
    """Delete partial files and folders of killed processes; returns their number.

    No other process may write to the folder meanwhile.
    """
    leftovers = list(Path(folder).glob(f".*{TEMPORARY_SUFFIX}"))
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return len(leftovers)


def fsync(path: Path | str) -> None:
    """Flush a file's content, or a folder's list of names, to the disk.

    Raises:
        OSError: the device reports that it could not write.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_name(partial: Path, path: Path, if_exists: Literal["error", "replace", "keep"]) -> None:
    retired = _partial_sibling(path)
    if if_exists == "replace" and path.exists():
        path.rename(retired)
    try:
        partial.rename(path)
    except OSError as error:
        # A rename onto a non-empty folder fails (ENOTEMPTY or EEXIST): another process was first.
        if not path.is_dir():
            if retired.exists():
                retired.rename(path)
            raise
        if if_exists != "keep":
            raise FileExistsError(f"{path} exists") from error
    shutil.rmtree(retired, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """Give files that a library made private the permissions of other files.

    The new folder has those of the process's umask.
    """
    usual = folder.stat().st_mode & 0o666
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.stat().st_mode & 0o777 == 0o600:
                path.chmod(usual)


def _fsync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            fsync(Path(parent, name))
        fsync(parent)


def _partial_sibling(path: Path) -> Path:
    """Return a random name in the same folder, hence on the same file system."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
