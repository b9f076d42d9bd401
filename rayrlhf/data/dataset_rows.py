"""Dataset rows from JSONL, Parquet, built-in or Hugging Face datasets, with errors per row."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.config.data import DatasetSection
from rayrlhf.data.row_slices import RowSlice, slice_lines, slice_list, slice_row_groups, slice_table
from rayrlhf.data.toy.builtin_rows import BUILTIN, read_builtin
from rayrlhf.errors import UserError

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
OTHER_FILES = (".json", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".zip")
"""Suffixes that mean a file and not a hub name, so that the error message is about the file."""
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
    """

    source: str
    values: list[dict[str, Any]]
    numbers: list[int]
    prompt_field: str

    def place(self, index: int) -> str:
        """Return file, row and field of a row's prompt, for error messages."""
        return f"{self.source}: row {self.numbers[index]}: {self.prompt_field}"


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
    """Read a dataset's first `limit` rows, or all, into memory.

    Raises:
        UserError: see `open_rows`; a line that is not a JSON object.
    """
    opened = open_rows(section)
    rows = Rows(opened.source, [], [], opened.prompt_field)
    for one in opened.slices:
        for numbers, values in one.chunks():
            rows.numbers.extend(numbers)
            rows.values.extend(values)
    return rows


def is_file(path: str) -> bool:
    """Return True for the path of a file, existing or not.

    False for a hub name or a folder.
    """
    file = Path(path).expanduser()
    return file.suffix.lower() in (*JSON_LINES, *PARQUET, *OTHER_FILES) or file.is_file()


def _slices(section: DatasetSection) -> Sequence[RowSlice]:
    if not is_file(section.path):
        return slice_table(_load_table(section), section.limit)
    path = Path(section.path).expanduser()
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{section.path}: no such file{_nearest_file(path)}")
    if suffix not in (*JSON_LINES, *PARQUET):
        raise UserError(f"{section.path}: expected a file ending in {', '.join((*JSON_LINES, *PARQUET))}")
    if section.subset is not None or section.split != "train":
        raise UserError(f"{section.path}: a file has no subset and no split; expected them on hub datasets only")
    cut = slice_lines if suffix in JSON_LINES else slice_row_groups
    return cut(section.path, path.resolve(), section.limit)


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
