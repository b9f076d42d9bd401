"""A folder as the hub lays out a dataset: subsets and splits in a front matter, Parquet shards behind them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*.parquet}
  - {split: test, path: main/test-*.parquet}
- config_name: other
  data_files:
  - {split: train, path: other/train-*.parquet}
---
# A dataset
"""


def write_hub_folder(folder: Path, rows: list[dict[str, Any]], shards: int = 2) -> Path:
    """Write `rows` as split train of subset main, in shards, and the first row alone as every other split."""
    files = {"main/train": rows, "main/test": rows[:1], "other/train": rows[:1]}
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for name, values in files.items():
        count = min(shards, len(values))
        size = -(-len(values) // count)
        for shard in range(count):
            path = folder / f"{name}-{shard:05d}-of-{count:05d}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(values[shard * size : (shard + 1) * size]), path)
    return folder
