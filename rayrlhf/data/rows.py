"""Reading dataset rows from a JSONL file, a Parquet file, a built-in or a hub name, with every mistake traced to its row."""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.config.data import DatasetSection
from rayrlhf.data.builtin_rows import BUILTIN, read_builtin
from rayrlhf.errors import UserError

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
OTHER_FILES = (".json", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".zip")
"""Endings that mean a file and not a hub name, so that the message is about the file."""
DEFAULT_FIELD = "prompt"


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a dataset.

    Attributes:
        source: file, built-in or hub name, for messages.
        values: one dictionary a row.
        numbers: what a reader calls each row: the line of a JSONL file, else 1, 2, ...
        prompt_field: the field that holds the prompt.
    """

    source: str
    values: list[dict[str, Any]]
    numbers: list[int]
    prompt_field: str

    def place(self, index: int) -> str:
        """Return file, row and field of a row's prompt, for messages."""
        return f"{self.source}: row {self.numbers[index]}: {self.prompt_field}"


def read_rows(section: DatasetSection) -> Rows:
    """Read a dataset's first `limit` rows, or all.

    Raises:
        UserError: no such file, dataset, subset or split; a line that is no JSON object; no rows.
    """
    field = section.prompt_field
    if section.path.startswith(BUILTIN):
        values, own_field = read_builtin(section.path, section.split, section.subset, section.limit)
        numbers = list(range(1, len(values) + 1))
        field = own_field if field == DEFAULT_FIELD else field
    else:
        numbers, values = _reader(section)(section)
    if not values:
        raise UserError(f"{section.path}: the dataset has no rows")
    return Rows(section.path, values, numbers, field)


Numbered = tuple[list[int], list[dict[str, Any]]]


def _reader(section: DatasetSection) -> Callable[[DatasetSection], Numbered]:
    path = Path(section.path).expanduser()
    suffix = path.suffix.lower()
    if suffix not in (*JSON_LINES, *PARQUET, *OTHER_FILES) and not path.is_file():
        return _read_with_datasets
    if not path.is_file():
        raise UserError(f"{section.path}: no such file{_nearest_file(path)}")
    if suffix not in (*JSON_LINES, *PARQUET):
        raise UserError(f"{section.path}: expected a file ending in {', '.join((*JSON_LINES, *PARQUET))}")
    if section.subset is not None or section.split != "train":
        raise UserError(f"{section.path}: a file has no subset and no split; expected them on hub datasets only")
    return _read_json_lines if suffix in JSON_LINES else _read_parquet


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor the folder {path.parent})"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _read_json_lines(section: DatasetSection) -> Numbered:
    numbers: list[int] = []
    values: list[dict[str, Any]] = []
    with Path(section.path).expanduser().open("rb") as file:
        for number, line in enumerate(file, start=1):
            if section.limit is not None and len(values) == section.limit:
                break
            if not line.strip():
                continue
            try:
                value = json.loads(line.rstrip())
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{section.path}: row {number}: not UTF-8 ({error.reason} at byte {error.start + 1})"
                ) from error
            except json.JSONDecodeError as error:
                raise UserError(f"{section.path}: row {number}: not JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(value, dict):
                raise UserError(f"{section.path}: row {number}: expected a JSON object, found {type(value).__name__}")
            numbers.append(number)
            values.append(value)
    return numbers, values


def _read_parquet(section: DatasetSection) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    values: list[dict[str, Any]] = []
    try:
        with pyarrow.parquet.ParquetFile(Path(section.path).expanduser()) as file:
            for batch in file.iter_batches():
                values += batch.to_pylist()
                if section.limit is not None and len(values) >= section.limit:
                    break
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{section.path}: not a Parquet file: {_first_line(error)}") from error
    values = values[: section.limit]
    return list(range(1, len(values) + 1)), values


def _read_with_datasets(section: DatasetSection) -> Numbered:
    """Read a hub dataset, or a folder, through the `datasets` package."""
    import datasets

    try:
        table = datasets.load_dataset(str(section.path), section.subset, split=section.split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        # Unknown names, subsets and splits, missing access and no network all come as these, with a message of their own.
        wanted = ", ".join(f"{key} {value}" for key, value in (("subset", section.subset), ("split", section.split)) if value)
        raise UserError(
            f"{section.path}: cannot load it as a file, folder or hub dataset ({wanted}): {_first_line(error)}"
        ) from error
    if section.limit is not None:
        table = table.select(range(min(section.limit, len(table))))
    return list(range(1, len(table) + 1)), table.to_list()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
