"""Dataset rows from files, built-in or Hugging Face datasets, with errors per row."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.config.data import DatasetSection
from rayrlhf.data.row_columns import recognized
from rayrlhf.data.row_files import (
    EXPECTED,
    FileOfMany,
    StreamSlice,
    check_file,
    folder_files,
    is_array,
    is_file,
    kind_of,
    listed,
    names_of,
    place_of,
)
from rayrlhf.data.row_slices import RowSlice, slice_lines, slice_list, slice_row_groups, slice_table
from rayrlhf.data.toy.builtin_rows import BUILTIN, read_builtin
from rayrlhf.errors import UserError

DEFAULT_FIELD = "prompt"
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files that identify a saved dataset, and one with splits."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a dataset.

    Attributes:
        source: file, built-in or hub name, for error messages.
        values: one dictionary per row.
        numbers: number of each row in error messages: the line of a JSONL file, else 1, 2, ...
        prompt_field: the field that holds the prompt.
        layout: name of the format that the columns define.
    """

    source: str
    values: list[dict[str, Any]]
    numbers: list[int]
    prompt_field: str
    layout: str = ""

    def place(self, index: int) -> str:
        """Return file, row and field of a row's prompt, for error messages."""
        return f"{place_of(self.source, self.numbers[index])}: {self.prompt_field}"


@dataclass(frozen=True, slots=True)
class RowSource:
    """A dataset that was located and not read yet.

    Attributes:
        source: file, built-in or hub name, for error messages.
        slices: all its rows, in order; at least one.
        prompt_field: the field that holds the prompt.
    """

    source: str
    slices: Sequence[RowSlice]
    prompt_field: str

    def first(self) -> tuple[int, dict[str, Any]]:
        """Return number and content of the first row; errors as `RowSlice.chunks`."""
        numbers, values = next(self.slices[0].chunks())
        return numbers[0], values[0]


def open_rows(section: DatasetSection) -> RowSource:
    """Locate a dataset's first `limit` rows, or all.

    Raises:
        UserError: no such file, dataset, subset or split; no rows.
    """
    field = section.prompt_field
    slices: Sequence[RowSlice]
    if section.path.startswith(BUILTIN):
        values, own_field = read_builtin(section.path, section.split, section.subset, section.limit)
        field = own_field if field == DEFAULT_FIELD else field
        slices = slice_list(values)
    else:
        slices = _slices(section)
    if not slices:
        raise UserError(f"{section.path}: the dataset has no rows")
    return RowSource(section.path, slices, field)


def read_rows(section: DatasetSection) -> Rows:
    """Read a prompt dataset's first `limit` rows, or all, into memory.

    Raises:
        UserError: see `open_rows`; a line that is not a JSON object.
    """
    opened = open_rows(section)
    section, layout = recognized_prompts(section, opened)
    rows = Rows(opened.source, [], [], section.prompt_field, layout)
    for one in opened.slices:
        for numbers, values in one.chunks():
            rows.numbers.extend(numbers)
            rows.values.extend(values)
    return rows


def recognized_prompts(section: DatasetSection, opened: RowSource) -> tuple[DatasetSection, str]:
    """Return the section with its format's columns, and the format's name."""
    section = section.model_copy(update={"prompt_field": opened.prompt_field})
    return recognized(opened.first()[1], section, "prompts")


def data_files(section: DatasetSection) -> list[Path]:
    """Return the files of a dataset.

    Empty for a built-in, a saved dataset, or one of the hub.

    Raises:
        UserError: a glob matches nothing.
    """
    if section.path.startswith(BUILTIN):
        return []
    paths = listed(section.path)
    if len(paths) == 1 and not is_file(paths[0]):
        folder = Path(paths[0]).expanduser()
        saved = (folder / SAVED).is_file() or (folder / SAVED_SPLITS).is_file()
        paths = folder_files(folder, section.split) if folder.is_dir() and section.subset is None and not saved else []
    return [Path(path).expanduser() for path in paths]


def _slices(section: DatasetSection) -> Sequence[RowSlice]:
    files = data_files(section)
    if not files:
        return slice_table(_load_table(section), section.limit)
    single = files == [Path(section.path).expanduser()]
    if not Path(section.path).expanduser().is_dir() and (section.subset is not None or section.split != "train"):
        for file in files:
            _check_kind(str(file), file)
        raise UserError(f"{section.path}: a file has no subset and no split; expected them on hub datasets only")
    slices: list[RowSlice] = []
    left = section.limit
    for index, file in enumerate(files):
        source = section.path if single else str(file)
        own = _file_slices(source, file, left)
        if left is not None:
            left -= sum(_rows_of(one) for one in own)
        slices += own if single else [FileOfMany(one, source, index) for one in own]
        if left is not None and left <= 0:
            break
    if not slices and not single:
        raise UserError(f"{names_of([str(file) for file in files])}: the dataset has no rows")
    return slices


def _rows_of(one: RowSlice) -> int:
    rows = getattr(one, "rows", None)
    return rows if rows is not None else len(getattr(one, "values", ()))


def _check_kind(source: str, file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{source}: no such file{_nearest_file(file)}")
    kind = kind_of(file)
    if kind is None:
        raise UserError(f"{source}: expected a file ending in {EXPECTED}")
    check_file(source, file)
    return kind


def _file_slices(source: str, path: Path, limit: int | None) -> Sequence[RowSlice]:
    kind, file = _check_kind(source, path), path.resolve()
    if kind in ("lines", "json"):
        # Under either name, a file holds either an array or one object per line.
        kind = "json" if is_array(file) else "lines"
    if kind == "parquet":
        return slice_row_groups(source, file, limit)
    if kind == "lines" and file.suffix.lower() not in (".gz", ".zst"):
        return slice_lines(source, file, limit)
    stream = StreamSlice(source, file, kind)
    if limit is None:
        return [stream] if next(stream.chunks(), None) else []
    values: list[dict[str, Any]] = []
    for _, part in stream.chunks():
        values += part[: limit - len(values)]
        if len(values) == limit:
            break
    return slice_list(values)


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor the folder {path.parent})"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _load_table(section: DatasetSection) -> Any:
    """Open a dataset as a memory-mapped table of the `datasets` package.

    Raises:
        UserError: unknown name, subset or split, no access, no network, or a folder of something else.
    """
    import datasets

    try:
        saved = _load_saved(section)
        return datasets.load_dataset(section.path, section.subset, split=section.split) if saved is None else saved
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        # Errors of name, subset, split, access and network are all of these classes, with a clear message.
        wanted = ", ".join(f"{key} {value}" for key, value in (("subset", section.subset), ("split", section.split)) if value)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{section.path}: cannot load it as a file, folder or hub dataset ({wanted}): {reason}") from error


def _load_saved(section: DatasetSection) -> Any:
    """Return a saved dataset; None if the path is not one."""
    import datasets

    folder = Path(section.path).expanduser()
    splits = folder / SAVED_SPLITS
    if not splits.is_file() and not (folder / SAVED).is_file():
        return None
    found = datasets.load_from_disk(folder)
    if not splits.is_file():
        if section.subset is not None or section.split != "train":
            raise UserError(f"{section.path}: a saved dataset without splits; expected no subset and no split")
        return found
    if section.subset is not None or section.split not in found:
        wanted = "no subset" if section.subset is not None else f"split {' or '.join(found)}, found {section.split}"
        raise UserError(f"{section.path}: a saved dataset; expected {wanted}")
    return found[section.split]
