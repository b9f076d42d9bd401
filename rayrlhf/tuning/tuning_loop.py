"""Training loop of a Ray Train worker: steps, evaluations, checkpoints and export.

The samples of a step depend only on the seed and the step, and the loss is aggregated over the whole step, so a resumed run, or
one with another number of workers, takes the same steps.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from rayrlhf.engines.scoring.frozen import training_device
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.process_group import leave
from rayrlhf.errors import AlarmError, UserError
from rayrlhf.observe.host_facts import record_model_checks
from rayrlhf.observe.loop_control import is_due
from rayrlhf.observe.stacks import write_on_signal
from rayrlhf.storage.atomic import full_disk, writing
from rayrlhf.tuning.data_plan import STATE_FILE, TRAIN_NAME, batch_plan, best_step, checkpoint_name
from rayrlhf.tuning.export import export_model
from rayrlhf.tuning.held_out import PreferenceScores
from rayrlhf.tuning.refusal import has_refusal, has_stop_request, write_refusal
from rayrlhf.tuning.sample_answers import AnswerSampler
from rayrlhf.tuning.sample_table import PairTable, StepTable
from rayrlhf.tuning.step_trainer import StepRecorder, StepTrainer
from rayrlhf.tuning.task import Task
from rayrlhf.tuning.whole_checkpoints import seal


@dataclass(frozen=True)
class TuningJob:
    """Picklable input of every worker.

    Attributes:
        task: what to train.
        folder: the run folder, absolute, on a file system that all workers share.
        working_folder: base of the user's relative paths.
        data: reference to (train table, held-out table or None).
        threads: compute threads of a worker.
    """

    task: Task
    folder: Path
    working_folder: Path
    data: "ray.ObjectRef[Any]"
    threads: int


def train_loop(settings: dict[str, Any]) -> None:
    """Run one worker.

    User errors are written to the run folder instead of raised, because Ray Train would retry them.
    """
    write_on_signal()
    job: TuningJob = settings["job"]
    if has_refusal(job.folder):
        return
    try:
        _Worker(job).run()
    except (UserError, AlarmError) as error:
        _refuse(job.folder, error)
    except Exception as error:
        if reason := full_disk(error):
            _refuse(job.folder, UserError(f"{job.folder}: {reason}; free some space, then the same command resumes"))
        else:
            raise


def _refuse(folder: Path, error: UserError | AlarmError) -> None:
    try:
        write_refusal(folder, error)
    except OSError:
        raise error from None  # no room for the file either: Ray Train passes it on, after its retries
    leave()  # the others stop waiting for this one


class _Worker:
    def __init__(self, job: TuningJob) -> None:
        self._job, self._task, self._config = job, job.task, job.task.config
        if job.working_folder.is_dir():  # on the driver's node, or one that shares its disk
            os.chdir(job.working_folder)
        torch.set_num_threads(job.threads)
        self._rank, self._ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        torch.manual_seed(self._config.run.seed * self._ranks + self._rank)
        self._train, self._held_out = ray.get(job.data)
        self._plan = batch_plan(self._task, self._train)
        self._engine = TrainEngine(self._task.spec(self._plan.total_steps))
        if self._rank == 0:
            record_model_checks(job.folder, {"model": self._engine.load_check})
        self._train = self._task.prepare(self._engine, self._train, job.folder)
        if self._held_out is not None:
            self._held_out = self._task.prepare(self._engine, self._held_out, job.folder)
        self._trainer = StepTrainer(self._task, self._engine, self._train, self._plan)
        self._answers: AnswerSampler | None = None
        self._scores: PreferenceScores | None = None

    def run(self) -> None:
        """Train from the last committed checkpoint to the end, and export.

        A stop request ends it after a checkpoint of the current step.
        """
        self._restore()
        done, total = self._engine.optimizer_steps, self._plan.total_steps
        first = self._rank == 0
        self._recorder = StepRecorder(self._job.folder, done, tensorboard=self._config.observe.tensorboard) if first else None
        if done == 0:
            self._evaluate(0)
        for step in range(done + 1, total + 1):
            self._trainer.take(step, self._recorder)
            last, stopping = step == total, self._stop_requested()
            saving = last or stopping or is_due(step, self._config.checkpoint.every)
            needed = saving and self._config.checkpoint.best_metric is not None
            found = self._evaluate(step) if last or needed or is_due(step, self._config.evaluation.every) else {}
            if saving:
                self._save(step, found)
            if stopping and not last:
                break
        else:
            self._export()
        if self._recorder is not None:
            self._recorder.close()

    def _stop_requested(self) -> bool:
        """Return True on all ranks, once one of them sees the request."""
        seen = torch.tensor(float(has_stop_request(self._job.folder)), device=training_device())
        if self._ranks > 1:
            torch.distributed.all_reduce(seen)
        return bool(seen)

    def _evaluate(self, step: int) -> dict[str, float]:
        """Evaluate on held-out data, generate responses, and return the metrics."""
        if self._held_out is None:
            return {}
        metrics, self._scores = self._task.evaluate(self._engine, self._held_out)
        if self._recorder is not None:
            self._recorder.evaluation(step, metrics, self._scores)
        if self._answers is None:
            self._answers = AnswerSampler(self._config, self._held_out, self._job.folder)
        self._answers.write(step, self._engine)
        return metrics

    def _save(self, step: int, metrics: dict[str, float]) -> None:
        """Report a checkpoint; every worker adds its part, and Ray Train commits the whole."""
        kept = self._job.folder / "checkpoints"
        with writing(kept), tempfile.TemporaryDirectory(prefix="rayrlhf-checkpoint-") as folder:
            self._engine.save_state(Path(folder))
            if self._rank == 0:
                state = {"step": step, "tokens": self._trainer.tokens, "workers": self._ranks}
                Path(folder, STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
            seal(Path(folder), step, self._rank)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step, **metrics}, checkpoint=checkpoint, checkpoint_dir_name=checkpoint_name(step))

    def _restore(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self._load(Path(folder))

    def _load(self, folder: Path) -> None:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        self._trainer.tokens = state["tokens"]
        self._engine.load_state(folder, resized=state["workers"] != self._ranks)

    def _export(self) -> None:
        """Export the best checkpoint's model if a metric is configured, else the last one's."""
        best = best_step(self._config.checkpoint.best_metric, self._job.folder)
        if best is not None and best != self._engine.optimizer_steps:
            self._load(self._job.folder / "checkpoints" / TRAIN_NAME / checkpoint_name(best))
            self._scores = None
        if self._scores is None and self._held_out is not None:
            _, self._scores = self._task.evaluate(self._engine, self._held_out)
        answer_format = self._train.format if isinstance(self._train, PairTable | StepTable) else None
        export_model(self._config, self._engine, self._scores, answer_format, self._job.folder / "export")
