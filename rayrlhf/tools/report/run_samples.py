"""A sample of a run's rollouts that fits on a page, and how many there are in all.

The rows come from files spread evenly over the run (the first and the last always among them), because one file a step would be
slow to read and too much to look at; the number of all rows stands in the files' footers and costs little. Texts are cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayrlhf.observe.samples import PART_PREFIX

TEXT_CHARACTERS = 600
MAX_FILES = 120


@dataclass(frozen=True, slots=True)
class SampledRollouts:
    """What was taken from a folder of samples.

    Attributes:
        rows: in the order of steps; texts cut, numbers finite or None.
        total: rows in all readable files.
        unreadable: files that are no Parquet.
    """

    rows: Sequence[dict[str, Any]] = ()
    total: int = 0
    unreadable: int = 0


def sample_rollouts(folder: Path, max_rows: int) -> SampledRollouts:
    """Take at most `max_rows` rows of a samples folder, spread evenly over its files; a missing folder has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    counts: dict[Path, int] = {}
    unreadable = 0
    for path in sorted(folder.glob("step-*.parquet")):
        try:
            counts[path] = pq.read_metadata(path).num_rows
        except (OSError, pa.ArrowException):
            unreadable += 1
    filled = [path for path, count in counts.items() if count]
    chosen = [filled[place] for place in spread(len(filled), min(MAX_FILES, max_rows))]
    rows: list[dict[str, Any]] = []
    for number, path in enumerate(chosen):
        share = max_rows * (number + 1) // len(chosen) - max_rows * number // len(chosen)
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException):
            unreadable += 1
            continue
        rows += [plain_row(row) for row in table.take(spread(table.num_rows, share)).to_pylist()]
    return SampledRollouts(rows, sum(counts.values()), unreadable)


def read_rollouts(path: Path, max_rows: int) -> list[dict[str, Any]]:
    """Return the first rows of one samples file; none where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return [plain_row(row) for row in pq.read_table(path).slice(0, max_rows).to_pylist()]
    except (OSError, pa.ArrowException):
        return []


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the places 0 to count - 1, evenly spread, ends included (the last alone where `most` is 1)."""
    if count <= most:
        return list(range(count))
    if most < 2:
        return [count - 1] * most
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """Cut a row's texts and empty what is no finite number."""
    return {name: _plain(value) for name, value in row.items()}


def reward_parts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the reward parts that any row has."""
    return sorted({name for row in rows for name, value in row.items() if name.startswith(PART_PREFIX) and value is not None})


def cut(text: str, characters: int = TEXT_CHARACTERS) -> str:
    """Return the text, or its beginning and how much is left out."""
    return text if len(text) <= characters else f"{text[:characters]} … [{len(text) - characters:,} more characters]"


def _plain(value: object) -> Any:
    if isinstance(value, str):
        return cut(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
