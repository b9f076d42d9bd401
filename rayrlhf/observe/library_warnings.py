"""Warnings of libraries: off the terminal, and in a file of the run folder.

Warnings and log lines of user code and of this package stay on the terminal.
"""

import logging
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rayrlhf.observe.user_output import is_user_file

FILE_NAME = "warnings.log"
MOST = 1000
"""Lines kept until there is a run folder; earlier ones are dropped."""
_PACKAGE = __name__.partition(".")[0]


class LibraryWarnings(logging.Handler):
    """Handler of records without another one, and of Python's warnings, inside `kept`.

    Attributes:
        shown: libraries' lines also go to the terminal.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.shown = False
        self._active = False
        self._path: Path | None = None
        self._lines: deque[str] = deque(maxlen=MOST)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the warnings of libraries inside the block."""
        before = warnings.showwarning
        self.shown, self._active, self._path = False, True, None
        self._lines.clear()
        before_last, logging.lastResort = logging.lastResort, self
        warnings.showwarning = self._show
        try:
            yield
        finally:
            warnings.showwarning = before
            logging.lastResort = before_last
            self._active = False

    def write_to(self, folder: Path) -> None:
        """Append the lines to a file of a run folder; no effect outside of `kept`."""
        if self._active:
            self._path = folder.absolute() / FILE_NAME
            self._flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record of user code or of this package, and keep a library's."""
        own = record.name.partition(".")[0] == _PACKAGE or is_user_file(record.pathname)
        try:
            text = self.format(record)
        except (TypeError, ValueError, LookupError):  # a call with other arguments than its text has
            self.handleError(record)
            return
        self._take(text if own else f"{record.name}: {text}", own=own)

    def _show(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        own = category.__module__.partition(".")[0] == _PACKAGE or is_user_file(filename)
        self._take(f"{filename}:{lineno}: {category.__name__}: {message}", own=own)

    def _take(self, text: str, *, own: bool) -> None:
        if own or self.shown:
            sys.stderr.write(f"{text}\n")
        if not own:
            self._lines.append(f"{time.strftime('%H:%M:%S')} {text}\n")
            self._flush()

    def _flush(self) -> None:
        """Write the kept lines; on a full disk they are lost."""
        if self._path is None or not self._lines:
            return
        with suppress(OSError), self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(self._lines)
        self._lines.clear()


LIBRARY_WARNINGS = LibraryWarnings()
"""The handler of this process."""
