"""`rayrlhf bench record`: cost of `observe.record` in time of a step and bytes.

Speeds of two runs differ by more than a record costs. So one run is measured by itself: the time in which a step waits for its
record, and the CPU time of the thread that writes it. The thread may use a core that is free otherwise, so that their sum is an
upper bound.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rayrlhf.observe.flight_record import FOLDER, read_record, recorded_steps
from rayrlhf.observe.metric_names import CHECKSUMS, RECORD, RECORD_THREAD
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.ppo.executed_step import recorded_rollouts
from rayrlhf.tools.bench.paired import in_new_process
from rayrlhf.tools.bench.work import PPOWork, Record

LEVELS: tuple[Record, ...] = ("light", "full")


@dataclass(frozen=True, slots=True)
class RecordCost:
    """Cost of the records of a run, over its timed steps.

    Attributes:
        level: `observe.record`.
        seconds: mean time of a step.
        waiting: share of this time in which a step waits for its record and for checksums.
        writing: CPU time of the thread that writes, as a share of the time of the steps.
        token_bytes: bytes of the records per sampled token.
    """

    level: Record
    seconds: float
    waiting: float
    writing: float
    token_bytes: float

    def line(self) -> str:
        """Return the cost in words."""
        return (
            f"observe.record={self.level}: at most {self.waiting + self.writing:.2%} of a step of {self.seconds:.2f} s "
            f"({self.waiting:.2%} waiting, {self.writing:.2%} in a thread), {self.token_bytes:.0f} bytes per sampled token"
        )


def bench_record(work: PPOWork, *, progress: Callable[[str], None] = lambda _: None) -> list[RecordCost]:
    """Run a job once with each level of `observe.record`."""
    found = []
    for level in LEVELS:
        found.append(in_new_process(_run, replace(work, record=level)))
        progress(found[-1].line())
    return found


def _run(work: PPOWork) -> RecordCost:
    from rayrlhf.ppo.train_ppo import train_ppo

    with tempfile.TemporaryDirectory() as name:
        work.write_prompts(Path(name))
        config = work.config("shared", Path(name))
        train_ppo(config)
        return record_cost(config.run.folder, work.record)


def record_cost(run: Path, level: Record) -> RecordCost:
    """Return the cost of the records of a run, without its first step."""
    rows = [row for row in read_metrics(run) if "time/step" in row][1:]
    seconds = sum(row["time/step"] for row in rows)
    waiting = sum(row.get(f"time/{phase}", 0.0) for row in rows for phase in (RECORD, CHECKSUMS))
    writing = sum(row[RECORD_THREAD] for row in rows)
    records = [read_record(run / FOLDER, step) for step in recorded_steps(run / FOLDER)]
    tokens = sum(int(rollout.action_mask.sum()) for record in records for rollout in recorded_rollouts(record).rollouts)
    size = sum(path.stat().st_size for path in (run / FOLDER).iterdir())
    return RecordCost(level, seconds / len(rows), waiting / seconds, writing / seconds, size / tokens)
