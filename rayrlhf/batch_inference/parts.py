"""A table as a folder of part files, each written atomically.

A part is the unit of work, memory and resuming. Part k holds rows k x size ... of the previous stage, in order. After a crash,
running the stage again writes the missing parts and changes no other. A seal (`done.json`) marks a complete stage.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.library_types import ArrowTable
from rayrlhf.storage.atomic import TEMPORARY_SUFFIX, file_atomically, write_atomically
from rayrlhf.storage.notes import read_note, reading

SEAL = "done.json"


@dataclass(frozen=True, slots=True)
class PartFolder:
    """The parts of one stage's table."""

    path: Path

    def part(self, index: int) -> Path:
        """Return the file of one part."""
        return self.path / f"part-{index:06d}.parquet"

    def indices(self) -> list[int]:
        """Return the indices of existing parts, in order."""
        return sorted(int(file.stem.removeprefix("part-")) for file in self.path.glob("part-*.parquet"))

    def files(self) -> list[Path]:
        """Return the part files in order."""
        return [self.part(index) for index in self.indices()]

    @property
    def sealed(self) -> bool:
        """True once the stage is complete."""
        return (self.path / SEAL).is_file()

    def facts(self) -> dict[str, Any]:
        """Return the facts stored in the seal.

        Raises:
            FileNotFoundError: the stage is not sealed.
        """
        return read_note(self.path / SEAL, "remove it, and the stage completes again")

    def seal(self, facts: dict[str, Any]) -> None:
        """Mark the stage as complete, and store facts about it."""
        self.clear_leftovers()
        write_atomically(self.path / SEAL, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")

    def clear_leftovers(self) -> None:
        """Remove temporary files of a killed writer."""
        for file in self.path.glob(f".*{TEMPORARY_SUFFIX}"):
            file.unlink(missing_ok=True)

    def write(self, index: int, table: ArrowTable) -> Path:
        """Write a part atomically, replacing an existing one."""
        import pyarrow.parquet as pq

        self.path.mkdir(parents=True, exist_ok=True)
        with file_atomically(self.part(index)) as partial:
            pq.write_table(table, partial, compression="zstd")
        return self.part(index)

    def read(self, index: int) -> Any:
        """Return a part as an Arrow table.

        Raises:
            UserError: it is damaged.
        """
        return _read(self.part(index), None)

    def tables(self, columns: list[str] | None = None) -> Iterator[Any]:
        """Yield the parts as Arrow tables in order, one in memory at a time."""
        for file in self.files():
            yield _read(file, columns)

    def rows(self, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield all rows in order as dictionaries."""
        for table in self.tables(columns):
            yield from table.to_pylist()


def _read(file: Path, columns: list[str] | None) -> Any:
    import pyarrow.parquet as pq

    with reading(file, "remove it, and start the command again"):
        return pq.read_table(file, columns=columns)


def merge(parts: PartFolder, path: Path) -> int:
    """Write all parts as one Parquet file and return its rows.

    One part is in memory at a time. The same parts give the same bytes.
    """
    import pyarrow.parquet as pq

    count = 0
    with file_atomically(path) as partial:
        writer: Any = None
        try:
            for table in parts.tables():
                writer = writer or pq.ParquetWriter(partial, table.schema, compression="zstd")
                writer.write_table(table)
                count += table.num_rows
        finally:
            if writer is not None:
                writer.close()
    return count
