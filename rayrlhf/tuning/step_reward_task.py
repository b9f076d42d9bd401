"""Process reward models as a task of the tuning loop, with a scalar head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rayrlhf.algorithms.losses import step_loss
from rayrlhf.config.tuning import RewardTrainingConfig
from rayrlhf.data.supervised.datasets import SliceMapper, load_step_data, map_in_order
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.preference import StepObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.engines.train.supervised_batches import step_batch, step_sequence
from rayrlhf.library_types import Tokenizer
from rayrlhf.models.network_io import Head
from rayrlhf.tuning.held_out import PreferenceScores, shared_scores
from rayrlhf.tuning.sample_table import StepTable, Table
from rayrlhf.tuning.task import Datasets, Metrics, Task


@dataclass(frozen=True)
class StepRewardTask(Task):
    """Cross-entropy of the labels of steps, with a scalar head."""

    config: RewardTrainingConfig

    @property
    def objective(self) -> StepObjective:
        """Cross-entropy of steps."""
        return StepObjective()

    def load(self, tokenizer: Tokenizer, map_slices: SliceMapper = map_in_order) -> Datasets:
        """See `Task.load`."""
        train, held_out = load_step_data(self.config.data, tokenizer, map_slices)
        rows = self.config.evaluation.rows
        kept = StepTable.labeled(held_out.samples[:rows], held_out.format) if held_out else None
        return StepTable.labeled(train.samples, train.format), kept, train.report

    def spec(self, total_steps: int) -> TrainEngineSpec:
        """See `Task.spec`."""
        spec, heads = super().spec(total_steps), frozenset[Head]({"value"})
        return replace(spec, role="reward model", heads=heads, head_init=self.config.train.head_init)

    def batch(self, samples: Sequence[Any], engine: TrainEngine | None = None) -> TrainingBatch:
        """See `Task.batch`."""
        return step_batch(samples)

    def loss(self, metrics: Mapping[str, float]) -> float:
        """Mean over the steps of all responses."""
        return metrics["loss/steps"]

    def evaluate(self, engine: TrainEngine, held_out: Table) -> Metrics:
        """Return loss and accuracy on held-out steps.

        Accuracies on wrong steps and of the more frequent label are for comparison. The scores are the logits of pairs of a
        right and a wrong step.
        """
        samples = held_out.take(range(len(held_out))) if isinstance(held_out, StepTable) else []
        values = shared_scores(engine, [step_sequence(sample) for sample in samples], "values")
        found = [value[sample.loss_mask[-len(value) :]] for sample, value in zip(samples, values, strict=True)]
        logits = torch.from_numpy(np.concatenate(found))
        right = torch.from_numpy(np.concatenate([sample.right[sample.loss_mask] for sample in samples]))
        terms = step_loss(logits, right, torch.ones_like(right)).statistics
        metrics = {
            "evaluation/loss": float(terms["loss/steps"].mean()),
            "evaluation/accuracy": float(terms["accuracy"].mean()),
            "evaluation/frequent_label_accuracy": max(float(right.float().mean()), 1 - float(right.float().mean())),
        }
        better, worse = logits[right], logits[~right]
        pairs = min(len(better), len(worse))
        if not pairs:
            return metrics, None
        metrics["evaluation/wrong_step_accuracy"] = float(terms["accuracy"][~right].mean())
        return metrics, PreferenceScores(better[:pairs].numpy(), worse[:pairs].numpy(), np.zeros(pairs, dtype=np.float32))
