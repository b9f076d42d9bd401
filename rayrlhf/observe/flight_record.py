"""Records of a run's steps, from which `rayrlhf replay` executes a step again, in `records/`.

One Parquet file per step has a row per sample, and the data of the step as JSON in its metadata. Any Parquet reader opens it.
The name ends in a hash of the content, `step-000012.3f9a1c2b77d0e4f1.parquet`: a file that was cut or changed is refused before
any of it is read.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import write_atomically, writing
from rayrlhf.storage.notes import reading

FOLDER = "records"
FORMAT = 1
"""Version of the layout of a record."""
_HEADER = b"rayrlhf"
_NAME = re.compile(r"step-(\d{6,})\.([0-9a-f]{16})\.parquet")
_REMEDY = "remove it; other steps can still be replayed"

Rows = Sequence[NDArray[Any] | None]
"""Arrays of one dtype, one per sample, each of its own length; None where a sample has none."""
Column = NDArray[Any] | Rows | Sequence[str]
"""A number or text per sample, or an array per sample."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The record of one step.

    Attributes:
        step: steps done after it, as in `metrics.jsonl`.
        header: data of the whole step, plain JSON.
        columns: data of each sample by name, all of the same length.
    """

    step: int
    header: Mapping[str, Any]
    columns: Mapping[str, Column]

    def under(self, prefix: str) -> dict[str, Any]:
        """Return the columns whose names begin with a prefix, by the rest of the name."""
        return {name.removeprefix(prefix): column for name, column in self.columns.items() if name.startswith(prefix)}


def write_record(folder: Path, record: StepRecord) -> Path:
    """Write or replace the record of a step atomically; returns the file's path.

    Raises:
        UserError: the file cannot be written.
    """
    content = _encoded(record)
    path = folder / f"step-{record.step:06d}.{_hash(content)}.parquet"
    with writing(path):
        write_atomically(path, content)
        for other in _files(folder).get(record.step, []):
            if other != path:
                other.unlink(missing_ok=True)
    return path


def read_record(folder: Path, step: int) -> StepRecord:
    """Read the record of a step.

    Args:
        folder: `records/` of a run folder.
        step: steps done after it.

    Raises:
        UserError: there is no record of the step, or it is damaged.
    """
    paths = _files(folder).get(step)
    if not paths:
        raise UserError(f"step {step} has no record in {folder}: recorded are {listed(recorded_steps(folder))}")
    # A process that died between writing a record and removing the one that it replaces leaves both.
    path = max(paths, key=lambda path: path.stat().st_mtime_ns)
    with reading(path, _REMEDY):
        content = path.read_bytes()
        if _hash(content) != path.name.split(".")[1]:
            raise ValueError(f"its {len(content)} bytes do not have the hash in its name")
        record = _decoded(content)
        if record.step != step:
            raise ValueError(f"it is of step {record.step}")
    return record


def recorded_steps(folder: Path) -> list[int]:
    """Return the steps that have a record, in order."""
    return sorted(_files(folder))


def rewind_records(folder: Path, step: int) -> None:
    """Delete the records of later steps, before a run continues after `step`."""
    for later, paths in _files(folder).items():
        if later > step:
            for path in paths:
                path.unlink(missing_ok=True)


def listed(steps: Sequence[int]) -> str:
    """Return ordered steps as text, such as `1-4, 7`; `none` without any."""
    parts: list[str] = []
    first = None
    for index, step in enumerate(steps):
        first = step if first is None else first
        if step + 1 not in steps[index + 1 : index + 2]:
            parts.append(str(step) if first == step else f"{first}-{step}")
            first = None
    return ", ".join(parts) or "none"


def _files(folder: Path) -> dict[int, list[Path]]:
    found: dict[int, list[Path]] = {}
    for path in folder.glob("step-*.parquet"):
        if match := _NAME.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append(path)
    return found


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _encoded(record: StepRecord) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: _array(column) for name, column in record.columns.items()}
    header = {"format": FORMAT, "step": record.step} | dict(record.header)
    table = pa.table(arrays).replace_schema_metadata({_HEADER: json.dumps(header, separators=(",", ":"))})
    # Log-probs share their exponents and nothing else: in streams of one byte each, zstd finds those. Tokens repeat.
    floats: list[str] = []
    others: list[str] = []
    for field in table.schema:
        inner = field.type.value_type if pa.types.is_list(field.type) else field.type
        path = f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        (floats if pa.types.is_floating(inner) else others).append(path)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=others,
        use_byte_stream_split=floats,
        write_statistics=False,
    )
    return bytes(sink.getvalue())


def _array(column: Column) -> Any:
    import pyarrow as pa

    if isinstance(column, np.ndarray):
        return pa.array(column)
    if all(isinstance(row, str) for row in column):
        return pa.array(column, pa.string())
    present = [row for row in column if isinstance(row, np.ndarray)]
    lengths = [len(row) if isinstance(row, np.ndarray) else 0 for row in column]
    offsets = pa.array(np.cumsum([0, *lengths]).astype(np.int32))
    missing = pa.array([row is None for row in column])
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(present)), mask=missing)


def _decoded(content: bytes) -> StepRecord:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(content))
    header = json.loads(table.schema.metadata[_HEADER])
    if header.pop("format") != FORMAT:
        raise ValueError(f"another version of this program wrote it; expected format {FORMAT}")
    columns = {name: _column(table.column(name).combine_chunks()) for name in table.column_names}
    return StepRecord(header.pop("step"), header, columns)


def _column(array: Any) -> Column:
    import pyarrow as pa

    if pa.types.is_string(array.type):
        return list(array.to_pylist())
    if not pa.types.is_list(array.type):
        plain: NDArray[Any] = array.to_numpy(zero_copy_only=False)
        return plain
    values, offsets = array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy()
    present = array.is_valid().to_numpy(zero_copy_only=False)
    bounds = zip(present, offsets[:-1], offsets[1:], strict=True)
    return [values[start:end] if known else None for known, start, end in bounds]
