"""A subset of a run's rollouts for a page, and their total number.

The rows come from evenly spaced files of the run, first and last included, because reading one file per step would be slow and
the page too long. The total is the sum of the files' footers, which are cheap to read. Long texts are truncated.
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
    """Rows selected from a folder of samples.

    Attributes:
        rows: in step order; texts truncated, numbers finite or None.
        total: rows in all readable files.
        unreadable: number of files that are not Parquet.
    """

    rows: Sequence[dict[str, Any]] = ()
    total: int = 0
    unreadable: int = 0


def sample_rollouts(folder: Path, max_rows: int) -> SampledRollouts:
    """Select at most `max_rows` rows, evenly over the files of a samples folder."""
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
    chosen = [filled[place] for place in evenly_spaced(len(filled), min(MAX_FILES, max_rows))]
    rows: list[dict[str, Any]] = []
    for number, path in enumerate(chosen):
        share = max_rows * (number + 1) // len(chosen) - max_rows * number // len(chosen)
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException):
            unreadable += 1
            continue
        rows += [plain_row(row) for row in table.take(evenly_spaced(table.num_rows, share)).to_pylist()]
    return SampledRollouts(rows, sum(counts.values()), unreadable)


def read_rollouts(path: Path, max_rows: int) -> list[dict[str, Any]]:
    """Return the first rows of one samples file; [] if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return [plain_row(row) for row in pq.read_table(path).slice(0, max_rows).to_pylist()]
    except (OSError, pa.ArrowException):
        return []


def evenly_spaced(count: int, limit: int) -> list[int]:
    """Return at most `limit` evenly spaced indices in [0, count), first and last included.

    For a limit of 1 it is the last index.
    """
    if count <= limit:
        return list(range(count))
    if limit < 2:
        return [count - 1] * limit
    return [round(place * (count - 1) / (limit - 1)) for place in range(limit)]


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """Truncate a row's texts, and replace non-finite numbers by None."""
    return {name: _plain(value) for name, value in row.items()}


def reward_parts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of all reward components in the rows."""
    return sorted({name for row in rows for name, value in row.items() if name.startswith(PART_PREFIX) and value is not None})


def cut(text: str, characters: int = TEXT_CHARACTERS) -> str:
    """Return the text, truncated with the number of omitted characters if it is long."""
    return text if len(text) <= characters else f"{text[:characters]} … [{len(text) - characters:,} more characters]"


def _plain(value: object) -> Any:
    if isinstance(value, str):
        return cut(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
