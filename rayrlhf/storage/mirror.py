"""Mirror of a run's checkpoints on another storage: S3, Google Cloud Storage, a disk.

Any storage of pyarrow or fsspec works. A checkpoint is copied file by file, its manifest last; one without a manifest is
incomplete and ignored. Copies run in the background, one at a time. The run folder stays the primary copy, and a run continues
if a copy fails.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import folder_atomically
from rayrlhf.storage.manifest import FILE_NAME
from rayrlhf.storage.notes import reading

CONFIG_FILE = "config.yaml"
"""The run's resolved configuration, next to its checkpoints."""


class Mirror:
    """The folder of one run on another storage.

    Args:
        uri: such as `s3://bucket/runs`; credentials come from the storage's standard environment.
        name: name of the run's folder.

    Raises:
        UserError: the storage is unknown or does not respond.
    """

    def __init__(self, uri: str, name: str) -> None:
        self._files, root = _file_system(uri)
        self._root = f"{root}/{name}"
        self.uri = f"{uri.partition('?')[0].rstrip('/')}/{name}"
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rayrlhf-mirror")
        self._copying: Future[None] | None = None
        self._failure: OSError | None = None
        self._unreported: list[str] = []
        with self._refusal("read"):
            self._names()

    def claim(self, config_text: str, differences: Callable[[str, str], list[str]], *, resume: bool) -> None:
        """Claim the folder for this run.

        Args:
            config_text: the resolved configuration as YAML.
            differences: (stored, wanted) -> one line per key that differs.

        Raises:
            UserError: the folder holds another run, or any run and `resume` is False.
        """
        note, remedy = f"{self.uri}/{CONFIG_FILE}", "restore it, or choose another run.name"
        with self._refusal("write"), reading(note, remedy):
            stored = self._read(CONFIG_FILE)
        if stored is not None and not resume:
            raise UserError(f"checkpoint.mirror {self.uri} holds a run and run.resume is 'never': choose another run.name")
        with reading(note, remedy):
            found = differences(stored, config_text) if stored is not None else []
        if found:
            raise UserError(
                f"checkpoint.mirror {self.uri} holds a run with another configuration ({'; '.join(found[:5])}): "
                "choose another run.name"
            )
        with self._refusal("write"):
            self._files.create_dir(self._root, recursive=True)
            with self._files.open_output_stream(f"{self._root}/{CONFIG_FILE}") as stream:
                stream.write(config_text.encode())

    def names(self) -> list[str]:
        """Return folders with a manifest, sorted by name.

        Raises:
            UserError: the storage does not respond.
        """
        with self._refusal("read"):
            return self._names()

    def fetch(self, name: str, target: Path) -> None:
        """Copy a folder to `target` atomically.

        Raises:
            UserError: the storage cannot be read or the disk cannot be written.
        """
        from pyarrow.fs import FileSelector, FileType

        with self._refusal("read"), folder_atomically(target, if_exists="replace") as partial:
            base = f"{self._root}/{name}"
            for info in self._files.get_file_info(FileSelector(base, recursive=True)):
                if info.type is FileType.File:
                    path = partial / Path(info.path).relative_to(base)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with self._files.open_input_stream(info.path) as stream, path.open("wb") as file:
                        shutil.copyfileobj(stream, file)

    def push(self, folder: Path, keep: Sequence[str]) -> None:
        """Copy a complete folder in the background, then remove folders not in `keep`.

        Waits for the previous copy first.
        """
        self.wait()
        self._copying = self._worker.submit(self._push, folder, frozenset({*keep, folder.name}))

    def wait(self) -> str | None:
        """Wait for the current copy; returns why the newest one failed, or None."""
        if self._copying is not None:
            copying, self._copying = self._copying, None
            try:
                copying.result()
                self._failure = None
            except OSError as error:
                self._failure = error
                self._unreported.append(self._line(error))
        return self._line(self._failure) if self._failure else None

    def failures(self) -> list[str]:
        """Return a line for each copy that failed since the last call; never waits."""
        if self._copying is not None and self._copying.done():
            self.wait()
        unreported, self._unreported = self._unreported, []
        return unreported

    def close(self) -> None:
        """Shut down the background thread."""
        self._worker.shutdown()

    def _push(self, folder: Path, keep: frozenset[str]) -> None:
        base = f"{self._root}/{folder.name}"
        self._remove(folder.name)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path == folder / FILE_NAME):
            target = f"{base}/{path.relative_to(folder).as_posix()}"
            self._files.create_dir(target.rpartition("/")[0], recursive=True)
            with path.open("rb") as file, self._files.open_output_stream(target) as stream:
                shutil.copyfileobj(file, stream, 2**22)
        for name in self._names():
            if name not in keep:
                self._remove(name)

    def _line(self, error: OSError) -> str:
        return f"cannot write {self.uri}: {_brief(error)}"

    def _names(self) -> list[str]:
        from pyarrow.fs import FileSelector, FileType

        found = self._files.get_file_info(FileSelector(self._root, allow_not_found=True))
        folders = [info.path.rpartition("/")[2] for info in found if info.type is FileType.Directory]
        return sorted(name for name in folders if self._exists(f"{name}/{FILE_NAME}"))

    def _exists(self, name: str) -> bool:
        from pyarrow.fs import FileType

        return bool(self._files.get_file_info(f"{self._root}/{name}").type is FileType.File)

    def _read(self, name: str) -> str | None:
        if not self._exists(name):
            return None
        with self._files.open_input_stream(f"{self._root}/{name}") as stream:
            return str(stream.read().decode())

    def _remove(self, name: str) -> None:
        """Remove a folder, its manifest first, so that an interrupted removal is ignored."""
        from pyarrow.fs import FileType

        if self._exists(f"{name}/{FILE_NAME}"):
            self._files.delete_file(f"{self._root}/{name}/{FILE_NAME}")
        if self._files.get_file_info(f"{self._root}/{name}").type is FileType.Directory:
            self._files.delete_dir(f"{self._root}/{name}")

    @contextmanager
    def _refusal(self, verb: str) -> Iterator[None]:
        """Convert an `OSError` of the storage to a `UserError`."""
        try:
            yield
        except OSError as error:
            raise UserError(f"checkpoint.mirror: cannot {verb} {self.uri}: {_brief(error)}") from error


def _file_system(uri: str) -> tuple[Any, str]:
    """Return the pyarrow file system of a URI, or fsspec's wrapped, and the path."""
    from pyarrow import ArrowInvalid
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    if "://" not in uri:
        raise UserError(f"checkpoint.mirror {uri!r}: expected a URI such as s3://bucket/folder or file:///folder")
    try:
        files, path = FileSystem.from_uri(uri)
        return files, str(path).rstrip("/")
    except ArrowInvalid:
        pass
    except OSError as error:
        raise UserError(f"checkpoint.mirror {uri}: {_brief(error)}") from error
    import fsspec

    try:
        other, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise UserError(f"checkpoint.mirror {uri}: {_brief(error)}") from error
    return PyFileSystem(FSSpecHandler(other)), str(path).rstrip("/")


def _brief(error: BaseException | None) -> str:
    """Return the first line of an error; storage errors can be pages long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
