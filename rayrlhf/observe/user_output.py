"""Output of user code in actors, and its file in the run folder.

Ray writes the output of actors to its own logs, among that of libraries. Here a line counts as user code's if a frame of the
call that wrote it is in a file of the user: outside of Python's libraries and of this package, or in the module of a plugin.
"""

import logging
import os
import site
import sys
import sysconfig
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from rayrlhf.plugins import PLUGIN_FILES
from rayrlhf.storage.atomic import writing

FILE_NAME = "user_output.log"
MAX_LINES = 10_000
"""Lines kept between two calls of `take`; later ones are counted only."""
MAX_CHARACTERS = 10_000
"""Characters after which a line without an end is broken."""
_RAY = find_spec("ray")  # a second to import
_LIBRARIES = tuple(
    {
        *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *(folder + os.sep for folder in (*site.getsitepackages(), site.getusersitepackages())),
        f"{Path(__file__).parents[1]}{os.sep}",
        f"{Path(_RAY.origin).parents[1]}{os.sep}" if _RAY is not None and _RAY.origin else "<",
        "<",
    }
)


class UserOutput:
    """Lines of user code in this process, until they are taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: list[str] = []
        self._partial: dict[int, str] = {}
        self._dropped = 0

    def capture(self) -> None:
        """Watch `sys.stdout`, `sys.stderr` and loggers without a handler; once per process."""
        if isinstance(sys.stdout, _Watched):
            return
        sys.stdout, sys.stderr = _Watched(sys.stdout, self), _Watched(sys.stderr, self)
        logging.lastResort = _LastResort()
        if logging.root.level == logging.WARNING:
            logging.root.setLevel(logging.INFO)

    def write(self, text: str) -> None:
        """Append text of the calling thread; a carriage return starts its line again."""
        thread = threading.get_ident()
        with self._lock:
            *whole, rest = (self._partial.pop(thread, "") + text).split("\n")
            for line in whole:
                self._append(line)
            rest = rest.rpartition("\r")[2] if not rest.endswith("\r") else rest
            if len(rest) > MAX_CHARACTERS:
                self._append(rest)
            elif rest:
                self._partial[thread] = rest

    def take(self, *, last: bool = False) -> list[str]:
        """Return and forget the complete lines, each with its time of day.

        With `last` also those without an end.
        """
        with self._lock:
            if last:
                for text in self._partial.values():
                    self._append(text)
                self._partial.clear()
            lines, self._lines = self._lines, []
            if self._dropped:
                lines.append(f"{time.strftime('%H:%M:%S')} ... and {self._dropped} more lines, which were dropped")
                self._dropped = 0
            return lines

    def _append(self, line: str) -> None:
        text = line.rstrip("\r").rpartition("\r")[2]
        if len(self._lines) < MAX_LINES:
            self._lines.append(f"{time.strftime('%H:%M:%S')} {text}")
        else:
            self._dropped += 1


class OutputFile:
    """Appends lines to `user_output.log` in a run folder; the first one creates the file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder.absolute() / FILE_NAME

    def write(self, actor: str, lines: Sequence[str]) -> list[str]:
        """Append an actor's lines; returns them as written.

        Raises:
            UserError: the file cannot be written.
        """
        written = [f"{line[:8]} {actor}: {line[9:]}" for line in lines]
        with writing(self.path), self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{line}\n" for line in written)
        return written


class _Watched:
    """A text stream that also records the output of user code."""

    def __init__(self, stream: TextIO, output: UserOutput) -> None:
        self._stream = stream
        self._output = output

    def write(self, text: str) -> int:
        if is_user_code(sys._getframe(1)):
            self._output.write(text)
        return self._stream.write(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _LastResort(logging.Handler):
    """Handler of records without one.

    It passes on those of user code from INFO on, and those of libraries from WARNING on.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or is_user_file(record.pathname):
            sys.stderr.write(f"{record.levelname} {record.name}: {self.format(record)}\n")


def is_user_code(frame: FrameType | None) -> bool:
    """Return True if a frame or a caller is in a user's file."""
    while frame is not None:
        if is_user_file(frame.f_code.co_filename):
            return True
        frame = frame.f_back
    return False


def is_user_file(name: str) -> bool:
    """Return True for a file outside of libraries and of this package, or a plugin's."""
    return not name.startswith(_LIBRARIES) or any(name.startswith(file) for file in PLUGIN_FILES)
