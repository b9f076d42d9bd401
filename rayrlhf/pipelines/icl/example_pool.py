"""Examples and their index on disk, memory-mapped so that a node holds one copy.

The folder has `examples.arrow` (Arrow IPC), the positions sorted by task with the bounds of each task, and the data of the
selection: a BM25 index, vectors, or nothing.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from rayrlhf.batch_inference.ingest import describe_examples, ingest_dataset
from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.config.icl import ExamplesSection
from rayrlhf.demonstrations.example import Example
from rayrlhf.errors import UserError
from rayrlhf.library_types import ArrowTable
from rayrlhf.storage.atomic import file_atomically, write_atomically

EXAMPLES, ORDER, TASKS = "examples.arrow", "order.npy", "tasks.json"


class StoredPool(Sequence[Example]):
    """Memory-mapped examples."""

    def __init__(self, folder: Path) -> None:
        """Open a folder of `write_pool`."""
        import pyarrow as pa

        self._table: ArrowTable = pa.ipc.open_file(pa.memory_map(str(folder / EXAMPLES))).read_all()
        self._columns = [self._table.column(name) for name in ("identity", "prompt", "answer", "task")]
        order = np.load(folder / ORDER, mmap_mode="r")
        bounds: dict[str, list[int]] = json.loads((folder / TASKS).read_text(encoding="utf-8"))
        self.tasks: Mapping[str, NDArray[np.int64]] = {task: order[start:stop] for task, (start, stop) in bounds.items()}
        """Positions of each task."""

    def __len__(self) -> int:
        """Return the number of examples."""
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, position: int) -> Example: ...
    @overload
    def __getitem__(self, position: slice) -> list[Example]: ...
    def __getitem__(self, position: int | slice) -> Example | list[Example]:
        """Return one example, or several."""
        if isinstance(position, slice):
            return [self[place] for place in range(*position.indices(len(self)))]
        return Example(*(column[position].as_py() for column in self._columns))


def write_pool(parts: Iterable[Sequence[Example]], folder: Path) -> None:
    """Write examples and their positions by task; one part in memory at a time."""
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(name, pa.string()) for name in ("identity", "prompt", "answer", "task")])
    codes: dict[str, int] = {}
    coded: list[NDArray[np.int32]] = []
    with file_atomically(folder / EXAMPLES) as partial, pa.ipc.new_file(str(partial), schema) as writer:
        for part in parts:
            coded.append(np.array([codes.setdefault(example.task, len(codes)) for example in part], dtype=np.int32))
            columns = [[getattr(example, name) for example in part] for name in schema.names]
            arrays = [pa.array(column, pa.string()) for column in columns]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    code = np.concatenate(coded)
    with file_atomically(folder / ORDER) as partial, partial.open("wb") as file:
        np.save(file, np.argsort(code, kind="stable").astype(np.int64))
    ends = np.cumsum(np.bincount(code, minlength=len(codes)))
    starts = [0, *ends[:-1].tolist()]
    bounds = {task: [start, stop] for task, start, stop in zip(codes, starts, ends.tolist(), strict=True)}
    write_atomically(folder / TASKS, json.dumps(bounds) + "\n")


def write_vectors(vectors: Iterator[NDArray[np.float32]], count: int, path: Path) -> None:
    """Write vectors as one `.npy`, [count, width]; one part in memory at a time."""
    first = next(vectors)
    with file_atomically(path) as partial:
        shape = (count, first.shape[1])
        stored = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)  # type: ignore[no-untyped-call]
        start = 0
        for part in chain([first], vectors):
            stored[start : start + len(part)] = part
            start += len(part)
        stored.flush()


def read_examples(section: ExamplesSection, rows: PartFolder) -> Iterator[list[Example]]:
    """Yield the examples of each part; errors as `example_of`."""
    for table in rows.tables(["source", "prompt", "messages", "response", "columns"]):
        yield [example_of(row, section) for row in table.to_pylist()]


def example_of(row: Mapping[str, Any], section: ExamplesSection) -> Example:
    """Return an ingested row as an example.

    Raises:
        UserError: a conversational prompt, or a row without its task.
    """
    field, place = section.task_field, f"{section.path}:{row['source']}"
    if row["messages"] is not None:
        raise UserError(f"{place}: {section.prompt_field}: expected text, found a conversation")
    columns = json.loads(row["columns"]) if field is not None else {}
    if field is not None and columns.get(field) is None:
        raise UserError(f"{place}: {field}: missing, expected the row's task; found {', '.join(columns) or 'none'}")
    return Example(place, row["prompt"], row["response"], str(columns[field]) if field is not None else "")


def describe_pool(section: ExamplesSection, *, answered: bool = True, needs: Mapping[str, str] = MappingProxyType({})) -> str:
    """Read all rows as examples; return counts, format and columns in words, see `describe_examples`."""
    return describe_examples(section, answered=answered, needs=needs, check=partial(example_of, section=section))


def ingest_examples(
    section: ExamplesSection,
    folder: Path,
    rows_per_part: int,
    *,
    answered: bool = True,
    needs: Mapping[str, str] = MappingProxyType({}),
) -> PartFolder:
    """Ingest examples into `rows/` and `rejected/` of a folder; see `ingest_dataset`."""
    rows = PartFolder(folder / "rows")
    rejected = PartFolder(folder / "rejected")
    ingest_dataset(
        section, rows, rejected, rows_per_part=rows_per_part, tokenizer=None, longest=None, answered=answered, needs=needs
    )
    return rows
