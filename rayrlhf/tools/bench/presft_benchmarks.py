"""`rayrlhf bench presft`: which of its benchmarks to run, with what sizes."""

import json
from collections.abc import Callable
from pathlib import Path

from rayrlhf.errors import UserError
from rayrlhf.storage.atomic import write_atomically
from rayrlhf.tools.bench.benchmarks import write_comparisons

SIZES = {"scoring": 200_000, "generation": 2_048, "memory": 1_000_000}
NEW_TOKENS = 32
MODEL = "builtin:tiny?context=1024"


def run_bench_presft(what: str, rows: int, *, rounds: int, output: Path | None, echo: Callable[[str], None]) -> None:
    """Run a benchmark and show what it found.

    Args:
        what: `scoring`, `generation` or `memory`.
        rows: of a run; 0 for the usual size.
        rounds: runs of each contender; `memory` runs once.
        output: folder for the results.
        echo: told what is measured.

    Raises:
        UserError: an unknown benchmark.
    """
    if what not in SIZES:
        raise UserError(f"bench presft {what}: expected {', '.join(SIZES)}")
    from rayrlhf.actors.connection import connected
    from rayrlhf.tools.bench.presft import bench_generation, bench_scoring, million_rows

    rows = rows or SIZES[what]
    with connected(None):
        if what == "memory":
            gib, speed = million_rows(rows, echo)
            echo(f"{rows:,} rows: at most {gib:.2f} GiB in all processes together, {speed:,.0f} rows/s")
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
                found = {"rows": rows, "peak_gib": gib, "rows_per_second": speed}
                write_atomically(output / "presft-memory.json", json.dumps(found, indent=1))
            return
        if what == "scoring":
            comparison = bench_scoring(rows=rows, rounds=rounds, progress=echo)
        else:
            comparison = bench_generation(MODEL, prompts=rows, new_tokens=NEW_TOKENS, rounds=rounds, progress=echo)
    echo(comparison.as_markdown())
    if output is not None:
        write_comparisons([comparison], output, f"presft-{what}")
