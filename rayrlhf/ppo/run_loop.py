"""The loop around the steps of a run: what is due at a step's end, stopping when asked, and going back after a loss.

What is due at a step is decided from what is there already (an evaluation's file, a checkpoint), so that the same loop
begins a run, resumes one, and repeats steps after a loss.
"""

import difflib
from collections.abc import Mapping, Sequence

from rayrlhf.data.records import Prompt
from rayrlhf.errors import ActorLostError, AlarmError, StoppedError, UserError
from rayrlhf.models.load import load_tokenizer
from rayrlhf.observe.journal import MIRROR
from rayrlhf.observe.loop_control import StopRequest, is_due
from rayrlhf.ppo.checkpoint import Checkpoint, Checkpointer, load_checkpoint
from rayrlhf.ppo.gang_recovery import Recovery
from rayrlhf.ppo.replica_scaling import wanted_replicas
from rayrlhf.ppo.run_recorder import Recorder
from rayrlhf.ppo.sft_warmup import sft_warmup_batch
from rayrlhf.ppo.trainer import PPOTrainer


class RunLoop:
    """Takes a run from where it is to its last step.

    Args:
        trainer: takes the steps.
        recorder: writes the run folder.
        checkpointer: writes checkpoints.
        train_prompts: prompts with responses to imitate, for a warm-up.
        stop: whether the run was asked to stop.
    """

    def __init__(
        self,
        trainer: PPOTrainer,
        recorder: Recorder,
        checkpointer: Checkpointer,
        train_prompts: Sequence[Prompt],
        stop: StopRequest,
    ) -> None:
        self._trainer = trainer
        self._config = trainer.config
        self._recorder = recorder
        self._checkpointer = checkpointer
        self._prompts = train_prompts
        self._stop = stop
        self._recovery = Recovery(trainer, checkpointer, recorder.recovery)
        self._saved_step: int | None = None
        self._metrics: dict[str, float] = {}

    def run(self) -> None:
        """Resume if there is something to resume, train, and leave the model.

        Raises:
            StoppedError: the run was asked to stop; a checkpoint is there.
            AlarmError: a diagnostic sounded an alarm and `observe.on_alarm` is `stop`; a checkpoint is there.
            ActorLostError: recovering failed too often, or too few replicas are left; a checkpoint is there where possible.
        """
        self._resume()
        for callback in self._trainer.callbacks:
            callback.on_start(self._trainer)
        ended = False
        while not ended:
            try:
                ended = self._turn()
            except ActorLostError as error:
                self._recover(error)
        for callback in self._trainer.callbacks:
            callback.on_end(self._trainer)

    def _turn(self) -> bool:
        """Do what is due after the steps so far, and take one more; True when there is nothing left to do."""
        trainer, step = self._trainer, self._trainer.steps_done
        last = step == self._config.run.steps
        if step == 0 or last or is_due(step, self._config.evaluation.every):
            self._evaluate()
        if not trainer.warmed_up:
            self._warm_up()
        self._recovery.commit()
        due = step > 0 and (last or is_due(step, self._config.checkpoint.every))
        if due and step != self._saved_step:
            self._checkpoint(step)
        if last:
            self._finish_checkpoint()
            with self._recorder.waiting("exporting the model"):
                trainer.export(self._recorder.folder.export)
            return True
        if self._stop:
            self._end_as_asked()
        wanted = wanted_replicas(self._recorder.folder.path)
        if wanted is not None:
            trainer.fault_tolerance.pool.scale(wanted)
        self._metrics |= trainer.train_step()
        self._heed_alarms()
        self._announce(self._checkpointer.poll())
        self._tell_mirror_failures()
        return False

    def _heed_alarms(self) -> None:
        """Do what `observe.on_alarm` says about the alarms that the last step or evaluation was the first to show.

        Raises:
            AlarmError: the run is to end; a checkpoint is there.
        """
        alarms = [finding for finding in self._recorder.diagnosis.fresh if finding.severity == "alarm"]
        wanted, step = self._config.observe.on_alarm, self._trainer.steps_done
        if not alarms or wanted == "warn":
            return
        if step != self._saved_step:
            self._checkpoint(step)
        if wanted == "stop":
            self._finish_checkpoint()
            raise AlarmError(f"stopped after step {step}, as observe.on_alarm says; the same command resumes. {alarms[0]}")

    def _resume(self) -> None:
        """Continue from the newest usable checkpoint, if there is one and resuming is not switched off."""
        trainer, recorder = self._trainer, self._recorder
        if self._config.run.resume == "auto":
            with recorder.waiting("looking for a checkpoint"):
                fetched = self._checkpointer.fetch()
                checkpoint, lines = self._checkpointer.find()
            for line in [fetched, *lines] if fetched else lines:
                recorder.note(line)
            if checkpoint:
                with recorder.waiting(f"resuming from step {checkpoint.step}"):
                    trainer.load_state(load_checkpoint(checkpoint, trainer.actor_groups, self._config.deadlines.update))
                self._saved_step = checkpoint.step
        recorder.resume(trainer.steps_done)

    def _recover(self, error: ActorLostError) -> None:
        """Go back after the loss of a learning role; another loss that arrives here ends the run, with a checkpoint."""
        try:
            step = self._recovery.restore(error)
        except ActorLostError as final:
            self._save_before_the_end(final)
            raise
        self._recorder.rewind(step)
        self._saved_step = step if self._saved_step == step else None

    def _evaluate(self) -> None:
        """Answer the held-out prompts, unless a run that this one resumes has done so at this step."""
        trainer = self._trainer
        if trainer.evaluation_prompts and not self._recorder.has_evaluation(trainer.steps_done):
            with self._recorder.waiting(f"answering {len(trainer.evaluation_prompts)} held-out prompts"):
                self._metrics |= trainer.evaluate().metrics()
            self._heed_alarms()

    def _warm_up(self) -> None:
        """Imitate the given responses, where the configuration asks for it."""
        batch = sft_warmup_batch(self._config, self._prompts, load_tokenizer(self._config.model))
        with self._recorder.waiting(f"warming up on {len(batch)} given responses"):
            report = self._trainer.warm_up(batch)
        first, last = (report.step_metrics[index]["loss/cross_entropy"] for index in (0, -1))
        self._recorder.note(f"warm-up: cross-entropy {first:.2f} -> {last:.2f} nats per token over {len(batch)} responses")

    def _checkpoint(self, step: int) -> None:
        with self._recorder.waiting("copying the state for a checkpoint"):
            metric = best_metric(self._metrics, self._config.checkpoint.best_metric)
            self._announce(self._checkpointer.start(step, self._trainer.state(), metric))
        self._saved_step = step

    def _finish_checkpoint(self) -> None:
        """Wait until the newest checkpoint is in the run folder and, as far as the storage lets it, in its mirror."""
        self._announce(self._checkpointer.finish())
        with self._recorder.waiting("copying the checkpoint to its mirror"):
            self._checkpointer.copied()
        self._tell_mirror_failures()

    def _tell_mirror_failures(self) -> None:
        """Write down copies that failed as soon as that is known: who relies on the mirror must hear of it during the run."""
        for line in self._checkpointer.mirror_failures():
            self._recorder.recovery(MIRROR, self._config.run.name, f"{line}; the checkpoints in the run folder are whole", 0.0)

    def _announce(self, complete: Sequence[Checkpoint]) -> None:
        for checkpoint in complete:
            for callback in self._trainer.callbacks:
                callback.on_checkpoint(checkpoint.step, checkpoint.folder)

    def _end_as_asked(self) -> None:
        step = self._trainer.steps_done
        if step != self._saved_step:
            self._checkpoint(step)
        self._finish_checkpoint()
        raise StoppedError(f"stopped after step {step}, as {self._stop.signal_name} asked; the same command resumes")

    def _save_before_the_end(self, error: ActorLostError) -> None:
        """Keep the work since the last checkpoint if all of it is still there."""
        actor_groups = self._trainer.actor_groups
        gangs_alive = all(actor_groups[role].find_lost() is None for role in ("policy", "critic") if role in actor_groups)
        if self._trainer.consistent and gangs_alive and self._trainer.steps_done != self._saved_step:
            self._recorder.note(f"{error}; writing a checkpoint before the end")
            self._checkpoint(self._trainer.steps_done)
            self._finish_checkpoint()


def best_metric(metrics: Mapping[str, float], name: str | None) -> float | None:
    """The value by which checkpoints compete.

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
