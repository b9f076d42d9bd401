"""The columns of every Parquet file that Pre-SFT leaves. Each stage adds columns and takes none away."""

from functools import cache
from typing import Any


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
