"""The columns of every Parquet file that Pre-SFT leaves. Each stage adds columns and takes none away.

The user's dataset as a stream: row after row from a JSONL or Parquet file, a built-in or a hub name, never all in memory.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rayrlhf.config.data import DatasetSection
from rayrlhf.config.presft import PairsSection
from rayrlhf.data.dataset_rows import JSON_LINES, PARQUET, open_rows
from rayrlhf.errors import UserError


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it stands in the dataset.

    Attributes:
        number: the line of a JSONL file, else 1, 2, ...
        fields: the row; None where it could not be read.
        problem: why not.
        text: what stands there, for the rejected table.
    """

    number: int
    fields: dict[str, Any] | None
    problem: str = ""
    text: str = ""


def stream_rows(section: PairsSection) -> Iterator[SourceRow]:
    """Yield the first `limit` rows of a dataset, or all, in order.

    Raises:
        UserError: no such file or dataset, or not a Parquet file.
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
def schemas() -> dict[str, Any]:
    """Return the Arrow schema of each stage's files by name: rows, rejected, scores, relabeled.

    `row` numbers the usable rows of a round from 0; `source` is the row (the line of a JSONL file) of the user's own dataset,
    the same in all rounds. `messages` is a conversational prompt as JSON, `columns` the row's other fields as JSON. `finish` is
    "stop" or "length", `tokens` what was sampled. `sampling` is JSON.
    """
    import pyarrow as pa

    text, texts = pa.string(), pa.list_(pa.string())
    whole, real, reals = pa.int64(), pa.float64(), pa.list_(pa.float64())
    rows = [("row", whole), ("source", whole), ("prompt", text), ("messages", text), ("response", text)]
    rows += [("prompt_tokens", pa.int32()), ("response_tokens", pa.int32()), ("columns", text)]
    probes = [("probes", texts), ("probe_finish", texts), ("probe_tokens", pa.list_(pa.int32()))]
    scores = [("probe_bleu", reals), ("bleu", real), ("likelihood", real), ("model", text), ("sampling", text)]
    candidates = [("candidates", texts), ("candidate_scores", reals), ("refusals", texts), ("new_tokens", pa.int32())]
    decision = [
        ("struggling", pa.bool_()),
        ("decision", text),
        ("reason", text),
        ("new_response", text),
        ("guarded", pa.bool_()),
    ]
    made_by = [("relabel_model", text), ("relabel_sampling", text)]
    return {
        "rows": pa.schema(rows),
        "rejected": pa.schema([("source", whole), ("reason", text), ("content", text)]),
        "probed": pa.schema([*rows, *probes]),
        "scores": pa.schema([*rows, *probes, *scores]),
        "relabeled": pa.schema([*rows, *probes, *scores, *decision, *candidates, *made_by]),
    }


def extended(table: Any, name: str, columns: dict[str, list[Any]]) -> Any:
    """Return an Arrow table with further columns, in a stage's schema.

    Raises:
        KeyError: a column of the schema is neither in the table nor given.
    """
    import pyarrow as pa

    schema = schemas()[name]
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else table.column(field.name) for field in schema
    ]
    return pa.table(arrays, schema=schema)


def storable(text: str) -> str:
    """Replace lone surrogates, which a byte-level tokenizer or JSON can produce and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
