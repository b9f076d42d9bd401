"""One line for a disk that says no: full, read-only, not permitted, a file where a folder should be."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayrlhf.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal inside the block into the user's one line.

    Raises:
        UserError: names the path and the system's reason.
    """
    try:
        yield
    except OSError as error:
        # The culprit is worth naming when it is a folder above: a file in the way, a read-only mount.
        above = error.filename is not None and Path(error.filename) in path.parents
        raise UserError(f"cannot write {path}: {error.strerror or error}{f' ({error.filename})' if above else ''}") from error
