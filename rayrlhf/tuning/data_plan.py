"""Batch plan and checkpoint names that driver and workers derive independently."""

from pathlib import Path

from rayrlhf.data.supervised.optimizer_steps import BatchPlan, BatchSize
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.tuning.sample_table import Table
from rayrlhf.tuning.task import Task

TRAIN_NAME = "train"
"""Name of the Ray Train run below `checkpoints/` of the run folder."""
STATE_FILE = "progress.json"
"""File in a checkpoint, written by rank 0, with steps, tokens and number of workers."""


def batch_plan(task: Task, table: Table) -> BatchPlan:
    """Return the batches of a run, the same on the driver and on every worker."""
    config = task.config
    train = config.train
    size = BatchSize(train.samples_per_step, train.batch_tokens, config.workers.most)
    return BatchPlan(
        table.lengths, size, seed=config.run.seed, epochs=train.epochs, steps=train.steps, shuffle=config.data.shuffle
    )


def checkpoint_name(step: int) -> str:
    """Return the folder name of a checkpoint below `checkpoints/train/`."""
    return f"step-{step:06d}"


def best_step(metric: str | None, folder: Path) -> int | None:
    """Return the step of the best checkpoint by a held-out metric.

    None without a metric or a measurement.
    """
    key = f"evaluation/{metric}"
    sign = -1.0 if metric == "loss" else 1.0
    kept = folder / "checkpoints" / TRAIN_NAME
    found = [
        (sign * row[key], row["step"])
        for row in (read_metrics(folder) if metric is not None else [])
        if row.get(key) is not None and (kept / checkpoint_name(row["step"]) / STATE_FILE).is_file()
    ]
    return max(found)[1] if found else None
