"""Dataset slices that can be read independently, in any order and process.

A slice is a range of lines of a JSONL file, a row group of a Parquet file, or a file of another kind. It holds the
position and numbers of its rows, not their content: it is small and picklable, and reads on demand. Every reader goes through
slices, so one process and a cluster see the same rows under the same numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from rayrlhf.data.row_files import CHUNK_ROWS, parse_row
from rayrlhf.errors import UserError
from rayrlhf.library_types import ArrowTable

Chunk = tuple[list[int], list[dict[str, Any]]]
"""Row numbers, and the rows."""


class RowSlice(Protocol):
    """Consecutive rows of a dataset."""

    def chunks(self) -> Iterator[Chunk]:
        """Yield the rows in order, at most `CHUNK_ROWS` at once.

        Raises:
            UserError: a row cannot be read.
        """
        ...


@dataclass(frozen=True, slots=True)
class LinesSlice:
    """Lines of a JSONL file; blank lines are skipped.

    Attributes:
        source: name of the file in error messages.
        file: absolute path.
        start: byte offset of the first line.
        number: number of the first line, from 1.
        rows: number of lines that are not blank.
    """

    source: str
    file: Path
    start: int
    number: int
    rows: int

    def chunks(self) -> Iterator[Chunk]:
        """See `RowSlice.chunks`."""
        lines = self.lines()
        while part := list(islice(lines, CHUNK_ROWS)):
            yield [number for number, _ in part], [parse_row(line, f"{self.source}: row {number}") for number, line in part]

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield number and content of each line that is not blank."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            yield from islice(((number, line) for number, line in enumerate(file, self.number) if line.strip()), self.rows)


@dataclass(frozen=True, slots=True)
class RowGroupSlice:
    """One row group of a Parquet file, or its first rows.

    Attributes:
        source: name of the file in error messages.
        file: absolute path.
        group: index of the row group, from 0.
        number: number of its first row, from 1.
        rows: number of rows.
    """

    source: str
    file: Path
    group: int
    number: int
    rows: int

    def chunks(self) -> Iterator[Chunk]:
        """See `RowSlice.chunks`."""
        import pyarrow
        import pyarrow.parquet

        left, number = self.rows, self.number
        try:
            with pyarrow.parquet.ParquetFile(self.file) as file:
                for batch in file.iter_batches(CHUNK_ROWS, row_groups=[self.group]):
                    values = batch.slice(0, left).to_pylist()
                    yield list(range(number, number + len(values))), values
                    left, number = left - len(values), number + len(values)
                    if not left:
                        return
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # damaged pages come as any of them
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.source}: row {number}: cannot be read: {reason}; fetch the file again") from error


@dataclass(frozen=True, slots=True)
class ListSlice:
    """Rows in memory.

    Attributes:
        values: the rows; they are pickled with the slice.
        number: number of the first row, from 1.
    """

    values: list[dict[str, Any]]
    number: int

    def chunks(self) -> Iterator[Chunk]:
        """See `RowSlice.chunks`."""
        for start in range(0, len(self.values), CHUNK_ROWS):
            part = self.values[start : start + CHUNK_ROWS]
            yield list(range(self.number + start, self.number + start + len(part))), part


@dataclass(frozen=True, slots=True)
class TableSlice:
    """Rows of a memory-mapped table of the `datasets` package.

    Attributes:
        table: the whole table; only the names of its files are pickled.
        number: number of the first row, from 1.
        rows: number of rows.
    """

    table: ArrowTable
    number: int
    rows: int

    def chunks(self) -> Iterator[Chunk]:
        """See `RowSlice.chunks`."""
        end = self.number + self.rows
        for start in range(self.number, end, CHUNK_ROWS):
            numbers = range(start, min(start + CHUNK_ROWS, end))
            yield list(numbers), self.table.select(range(start - 1, numbers.stop - 1)).to_list()


def slice_lines(source: str, file: Path, limit: int | None) -> Sequence[LinesSlice]:
    """Split a JSONL file into slices of `CHUNK_ROWS` rows; reads the file once."""
    slices: list[LinesSlice] = []
    start = position = rows = total = 0
    first = 1
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if total == limit:
                break
            position += len(line)
            if line.strip():
                rows, total = rows + 1, total + 1
            if rows == CHUNK_ROWS:
                slices.append(LinesSlice(source, file, start, first, rows))
                start, first, rows = position, number + 1, 0
    return [*slices, LinesSlice(source, file, start, first, rows)] if rows else slices


def slice_row_groups(source: str, file: Path, limit: int | None) -> Sequence[RowGroupSlice]:
    """Split a Parquet file into its row groups.

    Raises:
        UserError: not a Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{source}: not a Parquet file: {str(error).splitlines()[0]}") from error
    slices: list[RowGroupSlice] = []
    total = 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        rows = size if limit is None else min(size, limit - total)
        if rows:
            slices.append(RowGroupSlice(source, file, group, total + 1, rows))
        total += rows
    return slices


def slice_list(values: list[dict[str, Any]]) -> Sequence[ListSlice]:
    """Split rows in memory into slices of `CHUNK_ROWS` rows."""
    return [ListSlice(values[start : start + CHUNK_ROWS], start + 1) for start in range(0, len(values), CHUNK_ROWS)]


def slice_table(table: ArrowTable, limit: int | None) -> Sequence[TableSlice]:
    """Split a `datasets` table into slices of `CHUNK_ROWS` rows."""
    total = len(table) if limit is None else min(limit, len(table))
    return [TableSlice(table, start + 1, min(CHUNK_ROWS, total - start)) for start in range(0, total, CHUNK_ROWS)]
