"""Metrics, TensorBoard events and evaluation details, written by the first worker."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

from rayrlhf.observe.metrics import MetricsSink
from rayrlhf.observe.phases import TOKENS_PER_SECOND
from rayrlhf.observe.trackers import TensorBoardSink
from rayrlhf.storage.atomic import write_atomically, writing
from rayrlhf.tuning.held_out import PreferenceScores

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
