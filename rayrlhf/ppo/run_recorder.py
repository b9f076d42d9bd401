"""Built-in callback that writes the run folder and updates the live view."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rayrlhf.actors.footprint import role_peaks
from rayrlhf.actors.heartbeat import HeartbeatMonitor
from rayrlhf.config.model import ModelSection
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.section import GIB
from rayrlhf.data.records import Float32, Prompt, Rollout
from rayrlhf.engines.scoring.reward_model import stored_chance
from rayrlhf.environments.transcript import transcript_lines
from rayrlhf.errors import UserError
from rayrlhf.models.load import load_tokenizer
from rayrlhf.observe.closing import EVALUATIONS
from rayrlhf.observe.diagnostics import Diagnosis
from rayrlhf.observe.flight_record import FOLDER
from rayrlhf.observe.journal import MIRROR, RecoveryJournal
from rayrlhf.observe.live import LiveView
from rayrlhf.observe.memory import PeakMemory, memory_limit_bytes
from rayrlhf.observe.metric_names import MEMORY_LIMIT, PEAK_MEMORY, RECORD_THREAD, REWARD_MODEL_CHANCE
from rayrlhf.observe.metrics import MetricsSink, read_metrics
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.observe.resampling import bootstrap_mean
from rayrlhf.observe.run_folder import open_run
from rayrlhf.observe.samples import Sample, SampleSink, read_samples
from rayrlhf.observe.stacks import save_stacks
from rayrlhf.observe.trace import TraceWriter
from rayrlhf.observe.trackers import TensorBoardSink, Tracker, open_tracker
from rayrlhf.observe.user_output import OutputFile
from rayrlhf.ppo.callbacks import Callback
from rayrlhf.ppo.evaluation import Evaluation
from rayrlhf.ppo.flight_recorder import FlightRecorder
from rayrlhf.ppo.scoring import ScoredRollouts
from rayrlhf.rewards.score import RewardBatch

if TYPE_CHECKING:
    from rayrlhf.ppo.trainer import PPOTrainer


class Recorder(Callback):
    """Holds the lock of a run folder and writes metrics, TensorBoard, samples, and trace.

    Attributes:
        folder: paths of the run folder.
        timer: phases of the current step; the trainer records them, the recorder writes them to the trace.
        diagnosis: findings up to the newest step.
        flight: writes the records of steps; None without `observe.record`.
        memory: peak memory over all processes of the run, sampled in the background.
    """

    def __init__(
        self, config: PPOConfig, config_text: str, differences: Callable[[str, str], list[str]], view: LiveView
    ) -> None:
        """Open or create the run folder.

        Raises:
            UserError: the folder holds another configuration, is locked, or cannot be written.
        """
        self._config = config
        self.folder = open_run(config.run.folder, config_text, differences, resume=config.run.resume)
        self.timer = PhaseTimer(listener=view.phase)
        self.memory = PeakMemory()
        self.diagnosis = Diagnosis()
        self._view = view
        self._metrics = MetricsSink(self.folder.path)
        self._samples = SampleSink(self.folder.samples)
        level = config.observe.record
        self.flight = None if level == "off" else FlightRecorder(self.folder.path / FOLDER, level)
        self._tokens = SampleTokens(config.model)
        self._evaluations = SampleSink(self.folder.path / EVALUATIONS)
        self._trace = TraceWriter(self.folder.path) if config.observe.trace else None
        self._journal = RecoveryJournal(self.folder.path)
        self._output = OutputFile(self.folder.path)
        self._told_output = False
        self._tensorboard: TensorBoardSink | None = None
        self._trackers: list[Tracker] = []
        self._reward_chance = stored_chance(config.reward.model.models) if config.reward.model else None
        self._failed_copies = 0
        self._monitor: HeartbeatMonitor | None = None

    def __enter__(self) -> Self:
        self.memory.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.memory.__exit__(kind, error, trace)
        self._view.stop()
        self._metrics.close()
        if self._trace:
            self._trace.close()
        if self._tensorboard:
            self._tensorboard.close()
        for tracker in self._trackers:
            tracker.close()
        try:
            if self.flight:
                self.flight.close()
        finally:
            self.folder.close()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Show a wait in the live view."""
        with self._view.wait(what):
            yield

    def has_evaluation(self, step: int) -> bool:
        """True if the folder has the evaluation after `step` steps."""
        return (self._evaluations.folder / f"step-{step:06d}.parquet").is_file()

    def note(self, text: str) -> None:
        """Show a permanent line."""
        self._view.note(text)

    def resume(self, step: int) -> None:
        """Continue after `step`; rows that an interrupted run wrote beyond it are dropped."""
        self._metrics.rewind(step)
        self._rewind_files(step)
        if self._config.observe.tensorboard:
            self._tensorboard = TensorBoardSink(self.folder.tensorboard, resumed_after=step if step else None)
        self.diagnosis.load(read_metrics(self.folder.path))
        plain = self._config.model_dump(mode="json")
        self._trackers = [open_tracker(name, self._config.run.name, plain) for name in self._config.observe.trackers]
        self._view.start(self._config.run.steps, step)

    def rewind(self, step: int) -> None:
        """Go back to `step` within a run; rows of later steps are dropped."""
        self._metrics.rewind(step)
        self.diagnosis.load(read_metrics(self.folder.path))
        self._rewind_files(step)
        if self._tensorboard:
            self._tensorboard.close()
            self._tensorboard = TensorBoardSink(self.folder.tensorboard, resumed_after=step if step else None)

    def _rewind_files(self, step: int) -> None:
        """Drop samples, evaluations and records of later steps."""
        self._samples.rewind(step)
        self._evaluations.rewind(step)
        if self.flight:
            self.flight.rewind(step)

    def recovery(self, event: str, actor: str, reason: str, seconds: float) -> None:
        """Record and show a loss or a recovery."""
        self._journal.write(event, actor, reason, seconds)
        self._failed_copies += event == MIRROR
        took = f" after {seconds:.1f} s" if seconds else ""
        self._view.note(f"{actor}: {event}{took}{f' ({reason})' if reason else ''}")

    def user_output(self, actor: str, lines: Sequence[str]) -> None:
        """Record output of user code; name its file once, or show it."""
        try:
            written = self._output.write(actor, lines)
        except UserError as error:
            written, self._told_output = [], True
            self._view.note(f"output of your code is lost: {error}")
        if self._config.observe.user_output:
            for line in written:
                self._view.note(line)
        elif not self._told_output:
            self._view.note(f"output of your code: {self._output.path} (observe.user_output=true shows it here)")
        self._told_output = True

    def stacks(self, actor: str, text: str) -> None:
        """Keep the stacks of a process that hangs, for `rayrlhf debug`."""
        with suppress(OSError):
            save_stacks(self.folder.path, actor, text)

    def on_start(self, trainer: "PPOTrainer") -> None:
        """Keep the heartbeat monitor, whose replies carry memory figures."""
        self._monitor = trainer.fault_tolerance.monitor

    def on_step_end(self, step: int, metrics: Mapping[str, float], scored: ScoredRollouts) -> None:
        """Write metrics, samples and trace of the step."""
        row = dict(metrics) | {PEAK_MEMORY: self.memory.peak_bytes / GIB, MEMORY_LIMIT: memory_limit_bytes() / GIB}
        if self._monitor:
            row |= role_peaks(self._monitor.footprints())
        if self._reward_chance is not None:
            row[REWARD_MODEL_CHANCE] = self._reward_chance
        if self._config.checkpoint.mirror is not None:
            row["checkpoint/failed_copies"] = float(self._failed_copies)
        if self.flight:
            row[RECORD_THREAD] = self.flight.cpu_seconds()
        self.diagnosis.add(step, row)
        self._write(step, row | self.diagnosis.metrics)
        shown = range(min(len(scored.rollouts), self._config.observe.samples_per_step))
        self._samples.write(step, [self._trained_sample(scored, index) for index in shown])
        if self._trace:
            for span in self.timer.spans:
                self._trace.span(span.name, "driver", span.start, span.end - span.start, arguments={"step": step})
            self._trace.flush()
        self._view.step(step, row)
        self._show_findings()

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Write the responses of an evaluation, and its metrics under its step."""
        samples = [
            self._sample(prompt, rollout, evaluation.rewards, index)
            for index, (prompt, rollout) in enumerate(zip(evaluation.prompts, evaluation.rollouts, strict=True))
        ]
        self._evaluations.write(step, samples)
        self.diagnosis.add(step, evaluation.metrics())
        self._write(step, evaluation.metrics())
        scores = evaluation.rewards.scores
        shown = bootstrap_mean(scores) if np.isfinite(scores).all() else f"{evaluation.mean_score:.3f}"
        self._view.note(f"step {step}: held-out score {shown} over {len(evaluation.prompts)} prompts")
        self._show_findings()

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """Show the folder of the checkpoint."""
        self._view.note(f"step {step}: checkpoint {folder}")

    def _show_findings(self) -> None:
        for finding in self.diagnosis.fresh:
            self._view.note(str(finding))

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics.write(step, metrics)
        if self._tensorboard:
            self._tensorboard.write(step, metrics)
        for tracker in self._trackers:
            tracker.write(step, metrics)

    def _trained_sample(self, scored: ScoredRollouts, index: int) -> Sample:
        """Return a rollout of the step, with its tokens' KL if known."""
        rollout, kl = scored.rollouts[index], token_kl(scored, index)
        sample = self._sample(scored.prompts[rollout.key.prompt], rollout, scored.rewards, index)
        if kl is None:
            return sample
        texts = self._tokens.texts(rollout.response_ids.tolist())
        return replace(sample, kl=float(kl.sum()), tokens=texts, token_kl=kl.tolist())

    def _sample(self, prompt: Prompt, rollout: Rollout, rewards: RewardBatch, index: int) -> Sample:
        return Sample.of(
            rollout,
            prompt.text,
            float(rewards.scores[index]),
            parts={name: float(values[index]) for name, values in rewards.parts.items()},
            transcript=None if rollout.rewards is None else transcript_lines(rollout, self._tokens.tokenizer),
        )


def read_evaluation(folder: Path, step: int) -> list[dict[str, Any]]:
    """Return the evaluation after `step` steps, a row per held-out prompt; may be empty."""
    return [row for row in read_samples(folder / EVALUATIONS) if row["step"] == step]


class SampleTokens:
    """Decodes single tokens with the policy's tokenizer, loaded on first use."""

    def __init__(self, model: ModelSection) -> None:
        self._model = model

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token; part of a character becomes the replacement character."""
        return [str(self.tokenizer.decode([int(token)])) for token in token_ids]

    @cached_property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return load_tokenizer(self._model)


def token_kl(scored: ScoredRollouts, index: int) -> Float32 | None:
    """Return the policy's log-prob less the reference's at each response token of a rollout.

    Args:
        scored: a step's rollouts with the models' outputs.

    Returns:
        float32 [R] in nats, 0 on tokens that the policy did not sample (their sum is the estimate k1 of the response's KL;
        Schulman 2020, "Approximating KL Divergence"); None without a reference. Without a forward pass of the policy, the
        log-probs of the rollout engine are used.
    """
    rows = scored.forward_passes.get("reference")
    reference = rows[index].logprobs if rows is not None else None
    if reference is None:
        return None
    rollout = scored.rollouts[index]
    policy = scored.forward_passes.get("policy")
    read = policy[index].logprobs if policy is not None else None
    difference = (rollout.logprobs if read is None else read) - reference
    return np.where(rollout.action_mask, difference, np.float32(0)).astype(np.float32)
