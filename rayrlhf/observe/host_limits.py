"""Limits of this machine: open files, file size, temporary folder, free disk space.

A limit that is too low would end a run later: Ray reports it by a traceback after minutes. Here it is one line before Ray
starts.
"""

import os
import resource
import shutil
from pathlib import Path

from rayrlhf.config.section import GIB
from rayrlhf.errors import UserError
from rayrlhf.observe.memory import memory_limit_bytes

MIB = 2**20
OPEN_FILES = 1024
"""Fewest open files of a process; Ray's own processes hold several hundred connections."""
OBJECT_STORE_SHARE = 0.3
"""Share of the memory that Ray's object store maps as one file."""
FREE_BYTES = 64 * MIB
"""Fewest free bytes of the folder of Ray's logs and sockets, and of a run folder."""
LONGEST_FOLDER = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Longest path of the temporary folder; the kernel allows 107 bytes for the path of a socket."""


def temporary_folder() -> Path:
    """Return the folder in which Ray keeps its sessions."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")  # noqa: S108


def check_host_limits() -> None:
    """Check this machine's limits for a Ray cluster.

    Raises:
        UserError: a limit is too low; the message has the value to set.
    """
    files = _raised(resource.RLIMIT_NOFILE)
    if files is not None and files < OPEN_FILES:
        raise UserError(f"ulimit -n: {files} open files, expected at least {OPEN_FILES} for Ray's connections")
    size, store = _raised(resource.RLIMIT_FSIZE), OBJECT_STORE_SHARE * memory_limit_bytes()
    if size is not None and size < store:
        raise UserError(
            f"ulimit -f: files of at most {size / MIB:.1f} MiB, expected unlimited: Ray's object store is a file of "
            f"{store / GIB:.1f} GiB, and checkpoints are large"
        )
    folder = temporary_folder()
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise UserError(
            f"temporary folder {folder}: the path is too long for the sockets in it, expected at most {LONGEST_FOLDER} bytes; "
            "set RAY_TMPDIR to a shorter one"
        )
    check_free_space(folder, FREE_BYTES, "Ray's logs", "free some, or set RAY_TMPDIR to another folder")


def check_free_space(folder: Path, needed: float, what: str, remedy: str) -> None:
    """Check the free space of a folder, which need not exist yet.

    Args:
        needed: bytes.
        what: what is written there, for the error.
        remedy: what to do.

    Raises:
        UserError: less is free, or the folder has no file system.
    """
    try:
        free = shutil.disk_usage(existing_parent(folder)).free
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; {remedy}") from error
    if free < needed:
        raise UserError(f"{folder}: {free / MIB:.1f} MiB free, expected at least {needed / MIB:.0f} MiB for {what}; {remedy}")


def existing_parent(folder: Path) -> Path:
    """Return the folder, or its first existing parent."""
    folder = folder.absolute()
    return folder if folder.exists() or folder == folder.parent else existing_parent(folder.parent)


def _raised(which: int) -> int | None:
    """Raise a soft limit to the hard one; returns it, None for unlimited."""
    soft, hard = resource.getrlimit(which)
    if soft != hard:
        # Some systems give an unlimited number of open files, which programs try to close one by one.
        soft = hard if which == resource.RLIMIT_FSIZE else max(soft, min(hard, 65536) if hard >= 0 else 65536)
        resource.setrlimit(which, (soft, hard))
    return None if soft == resource.RLIM_INFINITY else soft
