"""Files that hold rows: kinds by suffix, several paths, globs, folders, and streams of rows.

Kinds are JSON lines, JSON arrays, CSV, TSV and Parquet, each but Parquet also compressed by gzip or Zstandard. A path may name
several files: a glob, or a list, which the configuration stores with commas in between.
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from rayrlhf.errors import UserError

KINDS = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst")
OTHER_FILES = (".txt", ".arrow", ".zip", ".xz", ".bz2", ".tar", ".xlsx", ".pkl", ".yaml", ".yml")
"""Suffixes that mean a file and not a hub name, so that the error message is about the file."""
EXPECTED = f"{', '.join(KINDS)}, or the same but Parquet with {' or '.join(COMPRESSED)}"
SPLIT_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "val", "dev"),
}
"""Words in the name of a file or folder that assign it to a split, as in the `datasets` package."""
CHUNK_ROWS = 4096
"""Rows read at once: enough to keep all cores of a tokenizer busy, few enough to keep memory flat."""
_LFS = b"version https://git-lfs.github.com/spec/"
_SURROGATE = re.compile(rb"\\u[dD][89abAB]|\xed[\xa0-\xbf]")
"""A UTF-16 surrogate, escaped or encoded; most are half of a valid pair."""
_decode = json.JSONDecoder().decode
_GLOB = re.compile(r"[*?\[]")


def kind_of(path: Path) -> str | None:
    """Return `lines`, `json`, `csv` or `parquet` by suffix; None for any other."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        inner = KINDS.get(path.with_suffix("").suffix.lower())
        return None if inner == "parquet" else inner
    return KINDS.get(suffix)


def is_file(path: str) -> bool:
    """Return True for the path of a file, existing or not.

    False for a hub name or a folder.
    """
    file = Path(path).expanduser()
    return file.suffix.lower() in (*KINDS, *COMPRESSED, *OTHER_FILES) or file.is_file()


def listed(path: str) -> list[str]:
    """Return the single paths of a list or glob, sorted within a glob.

    Raises:
        UserError: a glob matches nothing.
    """
    if Path(path).expanduser().exists():
        return [path]
    paths: list[str] = []
    for one in path.split(", "):
        if not _GLOB.search(one) or Path(one).expanduser().exists():
            paths.append(one)
            continue
        pattern = Path(one).expanduser()
        base = Path(pattern.anchor)
        found = sorted(str(file) for file in base.glob(str(pattern.relative_to(base))) if file.is_file())
        if not found:
            raise UserError(f"{one}: no file matches")
        paths += found
    return paths


def folder_files(folder: Path, split: str) -> list[str]:
    """Return the data files of a folder's split, sorted.

    Empty for a folder in another layout. Files without a word for a split in their names are all `train`, if no file has one.
    """
    if (folder / "README.md").is_file() and re.search(r"^configs:", (folder / "README.md").read_text(errors="replace"), re.M):
        return []
    files = sorted(file for file in folder.rglob("*") if kind_of(file) and not _hidden(file.relative_to(folder)))
    splits = [_split_of(file.relative_to(folder)) for file in files]
    if not any(splits):
        return [str(file) for file in files] if split == "train" else []
    return [str(file) for file, one in zip(files, splits, strict=True) if one == split]


def _hidden(file: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.parts) or file.name == "dataset_info.json"


def _split_of(file: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(file).lower())
    return next((split for split, names in SPLIT_WORDS.items() if any(name in words for name in names)), None)


def check_file(source: str, file: Path) -> None:
    """Check that a file is data and not a Git LFS pointer.

    Raises:
        UserError: it is a pointer.
    """
    with file.open("rb") as opened:
        if opened.read(len(_LFS)) == _LFS:
            raise UserError(f"{source}: a Git LFS pointer and not the data: fetch it with `git lfs pull`")


def is_array(file: Path) -> bool:
    """Return True if a JSON file begins with an array or spread object."""
    with closing(open_bytes(file)) as opened:
        try:
            start = next((line for line in opened if line.strip()), b"").removeprefix(b"\xef\xbb\xbf").strip()
        except (OSError, EOFError, zlib.error):
            return False  # The reader names the row.
    return start.startswith(b"[") or start == b"{"


def open_bytes(file: Path) -> BinaryIO:
    """Open a file for reading, decompressed."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"), 1 << 20)
    return file.open("rb")


def parse_row(line: bytes, place: str) -> dict[str, Any]:
    """Return the JSON object in a line.

    Raises:
        UserError: it holds something else, or text that cannot be encoded.
    """
    try:
        # As `parse_json`, without its checks of bytes, which cost a third of the time.
        text = line.decode()
        value = _decode(text)
    except (ValueError, RecursionError):
        value = parse_json(line.rstrip(), place)
    else:
        if "\\ud" in text or "\\uD" in text:
            _check_surrogates(value, place)
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_json(text: bytes, place: str) -> Any:
    """Return a JSON value.

    Raises:
        UserError: invalid JSON or UTF-8, a lone surrogate, a number or nesting beyond Python's limits, or a NaN.
    """
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            _check_surrogates(value, place)
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 ({error.reason} at byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UserError(f"{place}: not JSON: {error.msg} at {line}column {error.colno}") from error
    except RecursionError as error:
        raise UserError(f"{place}: nested too deep for a JSON reader; flatten it, or remove the row") from error
    except ValueError as error:
        limit = sys.get_int_max_str_digits()
        raise UserError(f"{place}: an integer of more than {limit} digits; write it as text, or remove the row") from error
    return value


def _check_surrogates(value: object, place: str) -> None:
    if isinstance(value, str):
        check_text(value, place)
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_text(key, place)
            _check_surrogates(inner, f"{place}: {key}")
    elif isinstance(value, list):
        for inner in value:
            _check_surrogates(inner, place)


def check_text(text: str, where: str) -> None:
    """Check that a text can be encoded.

    Raises:
        UserError: it holds half of a surrogate pair, as after a cut within an emoji.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: a lone surrogate at character {error.start + 1}, half of an emoji that was cut; remove it from the text"
        ) from error


@dataclass(frozen=True, slots=True)
class StreamSlice:
    """All rows of a file that can be read from its start only.

    Attributes:
        source: name of the file in error messages.
        file: absolute path.
        kind: `lines`, `json` (an array) or `csv`.
    """

    source: str
    file: Path
    kind: str

    def chunks(self) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
        """See `RowSlice.chunks`."""
        rows = self._rows()
        while part := list(islice(rows, CHUNK_ROWS)):
            yield [number for number, _ in part], [row for _, row in part]

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        import pyarrow as pa

        number = 0
        read = {"lines": self._lines, "json": self._array, "csv": self._table}[self.kind]
        try:
            with closing(open_bytes(self.file)) as opened:
                for number, row in read(opened):
                    yield number, row
        except (OSError, EOFError, zlib.error, pa.ArrowInvalid) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.source}: row {number + 1}: cannot be read: {reason}; fetch the file again") from error

    def _lines(self, opened: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(opened, 1):
            if line.strip():
                yield number, parse_row(line, f"{self.source}: row {number}")

    def _array(self, opened: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
        value = parse_json(opened.read(), self.source)
        if isinstance(value, dict):
            raise UserError(
                f"{self.source}: one JSON object with {', '.join(value) or 'nothing'}; expected an array, or a row per line"
            )
        for number, row in enumerate(value, 1):
            if not isinstance(row, dict):
                raise UserError(f"{self.source}: row {number}: expected a JSON object, found {type(row).__name__}")
            yield number, row

    def _table(self, opened: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
        csv.field_size_limit(sys.maxsize)
        suffixes = [suffix.lower() for suffix in self.file.suffixes]
        lines = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
        reader = csv.reader(lines, delimiter="\t" if ".tsv" in suffixes else ",", strict=True)
        number = 0
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise UserError(f"{self.source}: two columns have one name: {', '.join(header)}")
            for fields in reader:
                if not fields:
                    continue
                number += 1
                if len(fields) != len(header):
                    raise UserError(
                        f"{self.source}: row {number} (line {reader.line_num}): {len(fields)} fields, expected {len(header)}: "
                        f"{', '.join(header)}"
                    )
                yield number, dict(zip(header, fields, strict=True))
        except UnicodeDecodeError as error:
            raise UserError(f"{self.source}: row {number + 1}: not UTF-8 ({error.reason})") from error
        except csv.Error as error:
            raise UserError(f"{self.source}: row {number + 1} (line {reader.line_num}): not CSV: {error}") from error


class RowNumber(int):
    """Number of a row in one of several files.

    Unique in the dataset; messages show the number within the file.
    """

    STRIDE = 1 << 40

    def __new__(cls, value: int, file: str = "") -> "RowNumber":
        """Return a number with the name of its file."""
        one = super().__new__(cls, value)
        one.file = file
        return one

    file: str


@dataclass(frozen=True, slots=True)
class FileOfMany:
    """A slice of one of several files.

    Attributes:
        one: the slice.
        name: of the file.
        index: of the file, from 0.
    """

    one: Any
    name: str
    index: int

    def chunks(self) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
        """See `RowSlice.chunks`."""
        base = self.index * RowNumber.STRIDE
        for numbers, values in self.one.chunks():
            yield [RowNumber(base + number, self.name) for number in numbers], values


def place_of(path: str, number: int) -> str:
    """Return file and row, for error messages.

    Args:
        path: of the dataset; used if it is a single file.
        number: of the row.
    """
    return f"{getattr(number, 'file', '') or path}: row {number % RowNumber.STRIDE}"


def names_of(paths: Sequence[str]) -> str:
    """Return paths in words: all up to three, or the first and their number."""
    return ", ".join(paths) if len(paths) <= 3 else f"{paths[0]} and {len(paths) - 1} more files"
