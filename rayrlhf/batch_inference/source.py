"""Streaming reader of a dataset, which keeps unreadable lines as rows with their problem."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from rayrlhf.config.batch_inference import PairsSection
from rayrlhf.config.data import DatasetSection
from rayrlhf.data.dataset_rows import open_rows
from rayrlhf.data.row_files import parse_row
from rayrlhf.data.row_slices import LinesSlice
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
    named = DatasetSection(path=section.path, split=section.split, subset=section.subset, limit=section.limit)
    try:
        slices = open_rows(named).slices
    except UserError as error:
        if "the dataset has no rows" in str(error):
            return
        raise
    for one in slices:
        lines = getattr(one, "one", one)
        if isinstance(lines, LinesSlice):
            yield from map(_source_row, lines.lines())
            continue
        for numbers, rows in one.chunks():
            yield from map(SourceRow, numbers, rows)


def _source_row(numbered: tuple[int, bytes]) -> SourceRow:
    number, line = numbered
    try:
        return SourceRow(number, parse_row(line, ""))
    except UserError as error:
        reason = str(error).removeprefix(": ").split(";")[0]
        reason = "not JSON" if reason.startswith("not ") else reason
        return SourceRow(number, None, reason, line.decode("utf-8", "replace").strip())


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
