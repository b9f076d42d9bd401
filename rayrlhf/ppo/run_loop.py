"""The work between the steps of a run: evaluation, checkpoints, alarms, stop requests, and recovery.

The work that is due at a step is derived from existing results (the file of an evaluation, a checkpoint). So the same loop
starts a run, resumes a run, and repeats steps after a loss.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rayrlhf.data.records import Prompt
from rayrlhf.errors import ActorLostError, AlarmError, StoppedError, UserError
from rayrlhf.models.load import load_tokenizer
from rayrlhf.observe.journal import MIRROR
from rayrlhf.observe.loop_control import StopRequest, is_due
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.checkpoint import Checkpoint, Checkpointer, load_checkpoint
from rayrlhf.ppo.evaluation import Evaluation
from rayrlhf.ppo.gang_recovery import Recovery
from rayrlhf.ppo.model_updater import sft_warmup_batch
from rayrlhf.ppo.replica_scaling import wanted_replicas
from rayrlhf.ppo.run_recorder import Recorder
from rayrlhf.ppo.scoring import ScoredRollouts
from rayrlhf.ppo.step_driver import StepDriver


class RunLoop(Callback):
    """Takes a run from its current state to its last step.

    The caller runs the steps; the loop does the work between them.

    Args:
        driver: runs the steps. This loop is its last callback.
        recorder: writes the run folder.
        checkpointer: writes checkpoints.
        train_prompts: prompts with given responses, for an SFT warm-up.
        stop: true once a signal requested the end of the run.
    """

    def __init__(
        self,
        driver: StepDriver,
        recorder: Recorder,
        checkpointer: Checkpointer,
        train_prompts: Sequence[Prompt],
        stop: StopRequest,
    ) -> None:
        self._driver = driver
        self._config = driver.config
        self._recorder = recorder
        self._checkpointer = checkpointer
        self._prompts = train_prompts
        self._stop = stop
        self._recovery = Recovery(driver, checkpointer, recorder.recovery)
        self._saved_step: int | None = None
        self._told_unreachable = False
        self._metrics: dict[str, float] = {}
        driver.callbacks.append(self)

    @property
    def stop_requested(self) -> bool:
        """True once SIGTERM or Ctrl-C requested the end of the run."""
        return bool(self._stop)

    def resume(self) -> None:
        """Continue from the newest usable checkpoint, unless there is none or `run.resume` is `never`."""
        driver, recorder = self._driver, self._recorder
        if self._config.run.resume == "auto":
            with recorder.waiting("looking for a checkpoint"):
                fetched = self._checkpointer.fetch()
                checkpoint, lines = self._checkpointer.find()
            for line in [*fetched, *lines]:
                recorder.note(line)
            if checkpoint:
                with recorder.waiting(f"resuming from step {checkpoint.step}"):
                    try:
                        driver.load_state(load_checkpoint(checkpoint, driver.actor_groups, self._config.deadlines.update))
                    except ActorLostError as error:
                        self._recovery.restore(error)
                self._saved_step = checkpoint.step
        recorder.resume(driver.steps_done)
        self._stop.may_abandon = lambda: driver.abandonable

    def steps(self) -> Iterator[int]:
        """Yield the steps done before each step; see `PPOTrainer.steps`."""
        while not self._is_over():
            yield self._driver.steps_done

    @contextmanager
    def recovering(self) -> Iterator[None]:
        """Restore the committed state after a loss in the block; see `PPOTrainer.recovering`."""
        try:
            yield
        except ActorLostError as error:
            self._recover(error)
        except KeyboardInterrupt:
            if not self._stop:
                raise
            self._end_stopped()

    def on_step_end(self, step: int, metrics: Mapping[str, float], scored: ScoredRollouts) -> None:
        """Act on alarms, and report checkpoints and mirror copies that ended meanwhile."""
        self._metrics |= metrics
        self._handle_alarms()
        self._announce(self._checkpointer.poll())
        self._report_mirror_failures()

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Act on alarms."""
        self._metrics |= evaluation.metrics()
        self._handle_alarms()

    def save(self) -> Path:
        """Write a checkpoint of the current step, and wait until it is complete.

        Raises:
            UserError: the step was interrupted halfway.
        """
        step = self._driver.steps_done
        if not self._driver.consistent:
            raise UserError(f"save: step {step + 1} was interrupted halfway; reopen the trainer to resume from a checkpoint")
        if step != self._saved_step:
            self._checkpoint(step)
        self.finish_checkpoint()
        return self._checkpointer.folder_of(step)

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder; restore it first if it is lost.

        Raises:
            ActorLostError: the policy was restored at an earlier step, so that it is not the one to export.
        """
        step = self._driver.steps_done
        while self._driver.steps_done == step:
            with self._recorder.waiting("exporting the model"), self.recovering():
                self._driver.export(folder)
                return
        raise ActorLostError(f"export: the policy was lost and restored at step {self._driver.steps_done}, not {step}")

    def finish_checkpoint(self) -> None:
        """Wait until the newest checkpoint is complete, and its copy to the mirror has ended."""
        self._announce(self._checkpointer.finish())
        if self._config.checkpoint.mirror is not None:
            with self._recorder.waiting("copying the checkpoint to its mirror"):
                self._checkpointer.copied()
        self._report_mirror_failures()

    def _is_over(self) -> bool:
        """Do the work due before the next step; True when all are done."""
        while True:
            with self.recovering():
                return self._prepare()

    def _prepare(self) -> bool:
        driver, step = self._driver, self._driver.steps_done
        last = step >= self._config.run.steps
        if not driver.warmed_up:
            self._warm_up()
        if step == 0 or last or is_due(step, self._config.evaluation.every):
            self._evaluate()
        self._recovery.commit()
        due = step > 0 and (last or is_due(step, self._config.checkpoint.every))
        if due and step != self._saved_step:
            self._checkpoint(step)
        if last:
            self.finish_checkpoint()
            return True
        if self._stop:
            self._end_stopped()
        replicas = wanted_replicas(self._recorder.folder.path, self._recorder.note)
        if replicas is not None:
            driver.fault_tolerance.pool.scale(self._reachable(replicas))
        return False

    def _reachable(self, replicas: int) -> int:
        """Return the number of replicas without those that `ipc` cannot reach.

        A joining one has a GPU of its own.
        """
        planned = len(self._driver.actor_groups.plan.workers["rollout"])
        if replicas <= planned or self._driver.actor_groups.specs.weight_transfer != "ipc":
            return replicas
        if not self._told_unreachable:
            self._told_unreachable = True
            self._recorder.note(
                f"{replicas} replicas are wanted, but rollout.weight_transfer 'ipc' reaches those on the policy's GPUs only: "
                f"{planned} serve; resume with rollout.weight_transfer=shared_memory for more"
            )
        return planned

    def _end_stopped(self) -> NoReturn:
        """End with a checkpoint of the last whole step.

        A step that was abandoned after it changed state has none; the newest checkpoint remains.

        Raises:
            StoppedError: always.
        """
        self._stop.settle()
        step = self._driver.steps_done
        if self._driver.consistent:
            self.save()
        else:
            self.finish_checkpoint()
            step = self._saved_step or 0
        raise StoppedError(f"stopped after step {step} on {self._stop.signal_name}; the same command resumes")

    def _handle_alarms(self) -> None:
        """Do as `observe.on_alarm` says about alarms that are new since the last step or evaluation.

        Raises:
            AlarmError: the run is to end; its checkpoint is complete.
        """
        alarms = [finding for finding in self._recorder.diagnosis.fresh if finding.severity == "alarm"]
        action, step = self._config.observe.on_alarm, self._driver.steps_done
        if not alarms or action == "warn":
            return
        if step != self._saved_step:
            self._checkpoint(step)
        if action == "stop":
            self.finish_checkpoint()
            raise AlarmError(f"stopped after step {step}, as observe.on_alarm says; the same command resumes. {alarms[0]}")

    def _recover(self, error: ActorLostError) -> None:
        """Restore the committed state, or end the run with a checkpoint."""
        try:
            step = self._recovery.restore(error)
        except ActorLostError as final:
            self._save_before_the_end(final)
            raise
        self._recorder.rewind(step)
        self._saved_step = step if self._saved_step == step else None

    def _evaluate(self) -> None:
        """Answer the held-out prompts, unless the run folder has the evaluation of this step."""
        driver = self._driver
        if not self._config.reward.configured or not driver.evaluation_prompts:
            return
        if not self._recorder.has_evaluation(driver.steps_done):
            with self._recorder.waiting(f"answering {len(driver.evaluation_prompts)} held-out prompts"):
                driver.evaluate()

    def _warm_up(self) -> None:
        batch = sft_warmup_batch(self._config, self._prompts, load_tokenizer(self._config.model))
        with self._recorder.waiting(f"SFT warm-up on {len(batch)} given responses"):
            report = self._driver.warm_up(batch)
        first, last = (report.step_metrics[index]["loss/cross_entropy"] for index in (0, -1))
        self._recorder.note(f"SFT warm-up: cross-entropy {first:.2f} -> {last:.2f} nats per token over {len(batch)} responses")

    def _checkpoint(self, step: int) -> None:
        with self._recorder.waiting("copying the state for a checkpoint"):
            metric = best_metric(self._metrics, self._config.checkpoint.best_metric)
            self._announce(self._checkpointer.start(step, self._driver.state(), metric))
        self._saved_step = step

    def _report_mirror_failures(self) -> None:
        """Record failed copies at once, because a user may rely on the mirror."""
        for line in self._checkpointer.mirror_failures():
            self._recorder.recovery(MIRROR, self._config.run.name, f"{line}; the checkpoints in the run folder are whole", 0.0)

    def _announce(self, complete: Sequence[Checkpoint]) -> None:
        for checkpoint in complete:
            for callback in self._driver.callbacks:
                callback.on_checkpoint(checkpoint.step, checkpoint.folder)

    def _save_before_the_end(self, error: ActorLostError) -> None:
        """Keep the work since the last checkpoint if all of it is still there."""
        actor_groups = self._driver.actor_groups
        gangs_alive = all(actor_groups[role].find_lost() is None for role in ("policy", "critic") if role in actor_groups)
        if self._driver.consistent and gangs_alive and self._driver.steps_done != self._saved_step:
            self._recorder.note(f"{error}; writing a checkpoint before the end")
            self._checkpoint(self._driver.steps_done)
            self.finish_checkpoint()


def best_metric(metrics: Mapping[str, float], name: str | None) -> float | None:
    """Return the metric by which the best checkpoint is chosen.

    Raises:
        UserError: there is no such metric.
    """
    if name is None:
        return None
    if name not in metrics:
        near = difflib.get_close_matches(name, metrics, n=1)
        raise UserError(
            f"checkpoint.best_metric: no metric {name!r}; "
            + (f"did you mean {near[0]}?" if near else f"the run has {', '.join(sorted(metrics))}")
        )
    return float(metrics[name])
