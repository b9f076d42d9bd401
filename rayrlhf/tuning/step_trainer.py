"""One optimizer step of tuning on one worker: fetch its samples, update, write its numbers."""

from rayrlhf.data.supervised.optimizer_steps import BatchPlan
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.tuning.sample_table import Table
from rayrlhf.tuning.step_recorder import StepRecorder
from rayrlhf.tuning.task import Task


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
        batch = self._task.batch(self._table.take(self._plan.batch(step - 1)))
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
                **{f"time/{name}": seconds for name, seconds in report.seconds.items()},
            }
            recorder.step(step, numbers, tokens)
        return tokens
