"""Columns of the part files of Pre-SFT. Each step adds columns and removes none."""

from functools import cache
from typing import Any

from rayrlhf.batch_inference.source import row_schema
from rayrlhf.library_types import ArrowTable


@cache
def schemas() -> dict[str, Any]:
    """Return the Arrow schema of each step's part files by name: probed, scores, relabeled.

    All begin with the columns of `row_schema`. `probe_finish` is "stop" or "length". `probe_tokens` counts sampled tokens.
    `sampling` and `relabel_sampling` are JSON. `chrf` is null in parts written before version 0.2.
    """
    import pyarrow as pa

    text, texts = pa.string(), pa.list_(pa.string())
    real, reals = pa.float64(), pa.list_(pa.float64())
    probes = [("probes", texts), ("probe_finish", texts), ("probe_tokens", pa.list_(pa.int32()))]
    scores = [("probe_bleu", reals), ("bleu", real), ("chrf", real), ("likelihood", real), ("model", text), ("sampling", text)]
    decision = [
        ("struggling", pa.bool_()),
        ("decision", text),
        ("reason", text),
        ("new_response", text),
        ("guarded", pa.bool_()),
    ]
    candidates = [("candidates", texts), ("candidate_scores", reals), ("refusals", texts), ("new_tokens", pa.int32())]
    made_by = [("relabel_model", text), ("relabel_sampling", text)]
    rows = row_schema()
    return {
        "probed": pa.schema([*rows, *probes]),
        "scores": pa.schema([*rows, *probes, *scores]),
        "relabeled": pa.schema([*rows, *probes, *scores, *decision, *candidates, *made_by]),
    }


def with_columns(table: ArrowTable, name: str, columns: dict[str, list[Any]]) -> Any:
    """Return an Arrow table with further columns, in a step's schema.

    Raises:
        KeyError: a column of the schema is neither in the table nor given.
    """
    import pyarrow as pa

    schema = schemas()[name]
    if "bleu" in table.column_names and "chrf" not in table.column_names:
        columns = {"chrf": [None] * table.num_rows} | columns
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else table.column(field.name) for field in schema
    ]
    return pa.table(arrays, schema=schema)
