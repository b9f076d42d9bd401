"""Streaming reader of a dataset: JSONL, Parquet, built-in or hub."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rayrlhf.config.batch_inference import PairsSection
from rayrlhf.config.data import DatasetSection
from rayrlhf.data.dataset_rows import JSON_LINES, PARQUET, open_rows
from rayrlhf.errors import UserError


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of the dataset, as read.

    Attributes:
        number: the line of a JSONL file, else 1, 2, ...
        fields: the row; None where it could not be read.
        text: the unreadable line, for the rejected table.
    """

    number: int
    fields: dict[str, Any] | None
    problem: str = ""
    text: str = ""


def stream_rows(section: PairsSection) -> Iterator[SourceRow]:
    """Yield the first `limit` rows of a dataset, or all, in order.

    Raises:
        UserError: no such file or dataset, or an invalid Parquet file.
    """
    return islice(_stream(section), section.limit)


def _stream(section: PairsSection) -> Iterator[SourceRow]:
    path = Path(section.path).expanduser()
    if path.is_file() and path.suffix.lower() in JSON_LINES:
        return _json_lines(path)
    if path.is_file() and path.suffix.lower() in PARQUET:
        return _parquet(path)
    named = DatasetSection(path=section.path, split=section.split, subset=section.subset, limit=section.limit)
    chunks = chain.from_iterable(one.chunks() for one in open_rows(named).slices)
    return (SourceRow(number, fields) for numbers, rows in chunks for number, fields in zip(numbers, rows, strict=True))


def _json_lines(path: Path) -> Iterator[SourceRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                yield SourceRow(number, None, f"not JSON: {error}", line.decode("utf-8", "replace").strip())
                continue
            if isinstance(value, dict):
                yield SourceRow(number, value)
            else:
                text = line.decode("utf-8", "replace").strip()
                yield SourceRow(number, None, f"expected a JSON object, found {type(value).__name__}", text)


def _parquet(path: Path) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield SourceRow(number, fields)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file: {str(error).splitlines()[0]}") from error


@cache
def row_schema() -> Any:
    """Return the Arrow schema of usable rows.

    `row` numbers the usable rows from 0. `source` is the row (the line of a JSONL file) of the user's dataset. `messages` is a
    conversational prompt as JSON, `columns` the row's other fields as JSON.
    """
    import pyarrow as pa

    text, whole = pa.string(), pa.int64()
    rows = [("row", whole), ("source", whole), ("prompt", text), ("messages", text), ("response", text)]
    return pa.schema([*rows, ("prompt_tokens", pa.int32()), ("response_tokens", pa.int32()), ("columns", text)])


def rejected_schema() -> Any:
    """Return the Arrow schema of unusable rows."""
    import pyarrow as pa

    return pa.schema([("source", pa.int64()), ("reason", pa.string()), ("content", pa.string())])


def messages_type() -> Any:
    """Return the Arrow type of a conversation."""
    import pyarrow as pa

    return pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which a byte-level tokenizer or JSON can produce and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
