"""Optimizer steps of tuning on one worker, and the metrics that the first worker writes."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from rayrlhf.data.supervised.optimizer_steps import BatchPlan
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.observe.metrics import MetricsSink
from rayrlhf.observe.phases import TOKENS_PER_SECOND
from rayrlhf.observe.trackers import TensorBoardSink
from rayrlhf.storage.atomic import write_atomically, writing
from rayrlhf.tuning.held_out import PreferenceScores
from rayrlhf.tuning.sample_table import Table
from rayrlhf.tuning.task import Task

EVALUATIONS = "evaluation"
"""Folder of a run for calibration and margins of each reward-model evaluation."""


class StepRecorder:
    """Writes one line per step.

    Lines of an interrupted attempt after its last checkpoint are dropped and written again.
    """

    def __init__(self, folder: Path, done: int, *, tensorboard: bool) -> None:
        """Continue after `done` steps.

        Raises:
            UserError: the disk is full or not writable.
        """
        self._folder = folder
        self._metrics = MetricsSink(folder)
        self._metrics.rewind(done if done else -1)
        self._tensorboard = TensorBoardSink(folder / "tensorboard", resumed_after=done or None) if tensorboard else None
        self._since = time.monotonic()

    def step(self, step: int, numbers: Mapping[str, float], tokens: int) -> None:
        """Write an optimizer step that trained on `tokens` tokens over all workers."""
        now = time.monotonic()
        self._write(step, {**numbers, TOKENS_PER_SECOND: tokens / (now - self._since), "time/step": now - self._since})
        self._since = time.monotonic()

    def evaluation(self, step: int, metrics: Mapping[str, float], scores: PreferenceScores | None) -> None:
        """Write an evaluation under its step."""
        self._write(step, metrics)
        if scores is not None:
            path = self._folder / EVALUATIONS / f"step-{step:06d}.json"
            with writing(path):
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, json.dumps(dict(metrics) | scores.details(), indent=1))
        self._since = time.monotonic()

    def close(self) -> None:
        """Close the files."""
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics.write(step, metrics)
        if self._tensorboard is not None:
            self._tensorboard.write(step, metrics)


class StepTrainer:
    """Takes the steps of a plan.

    Attributes:
        tokens: trained on so far, over all workers.
    """

    def __init__(self, task: Task, engine: TrainEngine, table: Table, plan: BatchPlan) -> None:
        self.tokens = 0
        self._task, self._engine, self._table, self._plan = task, engine, table, plan

    def take(self, step: int, recorder: StepRecorder | None) -> int:
        """Take a step, counted from 1, and return its tokens over all workers.

        Only the first worker has a recorder.
        """
        batch = self._task.batch(self._table.take(self._plan.batch(step - 1)), self._engine)
        report = self._engine.update(batch, UpdatePlan([[range(len(batch))]]), self._task.objective)
        tokens = sum(batch.lengths)
        self.tokens += tokens
        if recorder is not None:
            numbers = {
                "loss": self._task.loss(report.metrics),
                **report.metrics,
                "grad_norm": report.grad_norms[-1],
                "learning_rate": report.learning_rates[-1],
                "epoch": self._plan.epoch_of(step - 1),
                "num_tokens": self.tokens,
                "padding_share": report.padding_share,
                **report.token_metrics,
                **{f"time/{name}": seconds for name, seconds in report.seconds.items()},
            }
            recorder.step(step, numbers, tokens)
        return tokens
