"""SFT datasets from part files: prompt and completion in one Parquet file, in bounded memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.batch_inference.source import messages_type, row_schema
from rayrlhf.storage.atomic import file_atomically


def repair(relabeled: PartFolder, repaired: PartFolder) -> int:
    """Apply the decisions: write the renumbered rows of the repaired dataset, and return their number.

    `mix` gives two rows per pair, `drop` none. The same decisions give the same files.
    """
    import pyarrow as pa

    count = 0
    for index, table in zip(relabeled.indices(), relabeled.tables(), strict=True):
        rows: list[dict[str, Any]] = []
        for row in table.to_pylist():
            for response in responses_of(row):
                changed = {"row": count + len(rows), "response": response}
                if response != row["response"]:
                    changed["response_tokens"] = None
                rows.append({name: (row | changed)[name] for name in row_schema().names})
        if rows:
            repaired.write(index, pa.Table.from_pylist(rows, schema=row_schema()))
        count += len(rows)
    repaired.seal({"rows": count})
    return count


def responses_of(row: dict[str, Any]) -> list[str]:
    """Return the responses of a pair to train on: none, one or two."""
    original, new = row["response"], row["new_response"]
    return {"keep": [original], "replace": [new], "mix": [original, new], "drop": []}[row["decision"]]


def write_dataset(rows: PartFolder, path: Path) -> None:
    """Write rows as one Parquet file with `prompt`, `completion` and `source`, unless it exists.

    Conversational prompts and their completions are lists of messages.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_file():
        return
    text: Any = pa.string()
    with file_atomically(path) as partial:
        writer: Any = None
        try:
            for table in rows.tables(["source", "prompt", "messages", "response"]):
                conversational = table.column("messages")[0].as_py() is not None
                kind = messages_type() if conversational else text
                schema = pa.schema([("prompt", kind), ("completion", kind), ("source", pa.int64())])
                writer = writer or pq.ParquetWriter(partial, schema, compression="zstd")
                writer.write_table(pa.Table.from_pylist(list(_examples(table.to_pylist())), schema=schema))
        finally:
            if writer is not None:
                writer.close()


def _examples(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        prompt, completion = row["prompt"], row["response"]
        if row["messages"] is not None:
            prompt, completion = json.loads(row["messages"]), [{"role": "assistant", "content": completion}]
        yield {"prompt": prompt, "completion": completion, "source": row["source"]}
