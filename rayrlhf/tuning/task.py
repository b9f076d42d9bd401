"""Task protocol of the tuning loop: data, loss, heads and evaluation.

SFT and reward modeling are here, DPO in `direct_preference_task.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayrlhf.config.tuning import RewardTrainingConfig, SFTConfig, TuningConfig
from rayrlhf.data.supervised.datasets import (
    DatasetReport,
    SliceMapper,
    load_preference_data,
    load_supervised_data,
    map_in_order,
)
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.base import Objective
from rayrlhf.engines.objectives.preference import PreferenceObjective
from rayrlhf.engines.objectives.supervised import CROSS_ENTROPY, CrossEntropyObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.engines.train.supervised_batches import preference_batch, supervised_batch
from rayrlhf.library_types import Tokenizer
from rayrlhf.models.network_io import Head
from rayrlhf.tuning.held_out import PreferenceScores, held_out_loss, held_out_rewards
from rayrlhf.tuning.sample_table import PairTable, SampleTable, Table

Datasets = tuple[Table, Table | None, DatasetReport]
"""Training table, held-out table and report of kept and dropped rows."""
Metrics = tuple[dict[str, float], PreferenceScores | None]
"""Metrics on held-out samples, and the rewards of pairs where there are some."""


class Task(ABC):
    """One way of tuning a model; picklable."""

    config: TuningConfig

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """Training objective."""

    @abstractmethod
    def load(self, tokenizer: Tokenizer, map_slices: SliceMapper = map_in_order) -> Datasets:
        """Read, check and encode the data by `map_slices`.

        Errors as `load_supervised_data` and `load_preference_data`.
        """

    def spec(self, total_steps: int) -> TrainEngineSpec:
        """Return the engine spec of every worker: a language model under the run's `train` section."""
        train = self.config.train
        return TrainEngineSpec(
            self.config.model,
            frozenset({"lm"}),
            train.engine_section(),
            train.learning_rate,
            total_optimizer_steps=total_steps,
            seed=self.config.run.seed,
            role="model",
            packing=train.packing,
            targets_only=True,
            sequence_parallel=self.config.workers.sequence_parallel,
            tensor_parallel=self.config.workers.tensor_parallel,
            expert_parallel=self.config.workers.expert_parallel,
        )

    def prepare(self, engine: TrainEngine, table: Table, folder: Path) -> Table:
        """Add values that the initial weights compute, such as reference log-probs.

        Every worker takes part, before a checkpoint is loaded.
        """
        return table

    @abstractmethod
    def batch(self, samples: Sequence[Any], engine: TrainEngine | None = None) -> TrainingBatch:
        """Return samples as a training batch.

        `engine` has the current weights, which some losses read; every worker takes part.
        """

    @abstractmethod
    def loss(self, metrics: Mapping[str, float]) -> float:
        """Loss of an optimizer step, from its statistics."""

    @abstractmethod
    def evaluate(self, engine: TrainEngine, held_out: Table) -> Metrics:
        """Evaluate on held-out samples; every worker takes part and gets the same result."""


@dataclass(frozen=True)
class SupervisedTask(Task):
    """Cross-entropy of the target tokens."""

    config: SFTConfig

    @property
    def objective(self) -> Objective:
        """Cross-entropy objective."""
        return CrossEntropyObjective()

    def load(self, tokenizer: Tokenizer, map_slices: SliceMapper = map_in_order) -> Datasets:
        """See `Task.load`."""
        train, held_out = load_supervised_data(self.config.data, tokenizer, map_slices)
        rows = self.config.evaluation.rows
        return SampleTable.of(train.samples), SampleTable.of(held_out.samples[:rows]) if held_out else None, train.report

    def spec(self, total_steps: int) -> TrainEngineSpec:
        """See `Task.spec`."""
        return replace(super().spec(total_steps), noise_alpha=self.config.train.neftune_alpha)

    def batch(self, samples: Sequence[Any], engine: TrainEngine | None = None) -> TrainingBatch:
        """See `Task.batch`."""
        return supervised_batch(samples)

    def loss(self, metrics: Mapping[str, float]) -> float:
        """Mean over the target tokens, in nats."""
        return metrics[CROSS_ENTROPY]

    def evaluate(self, engine: TrainEngine, held_out: Table) -> Metrics:
        """Return the same mean on held-out samples."""
        samples = held_out.take(range(len(held_out))) if isinstance(held_out, SampleTable) else []
        return {"evaluation/loss": held_out_loss(engine, samples)}, None


@dataclass(frozen=True)
class PreferenceTask(Task):
    """Bradley-Terry loss of pairs, with a bias-free scalar head."""

    config: RewardTrainingConfig

    @property
    def objective(self) -> Objective:
        """Bradley-Terry objective."""
        return PreferenceObjective(self.config.train.center_coefficient)

    def load(self, tokenizer: Tokenizer, map_slices: SliceMapper = map_in_order) -> Datasets:
        """See `Task.load`."""
        train, held_out = load_preference_data(self.config.data, tokenizer, map_slices)
        rows = self.config.evaluation.rows
        held_out_table = PairTable.of(held_out.samples[:rows], held_out.format) if held_out else None
        return PairTable.of(train.samples, train.format), held_out_table, train.report

    def spec(self, total_steps: int) -> TrainEngineSpec:
        """See `Task.spec`."""
        heads = frozenset[Head]({"value"})
        spec = super().spec(total_steps)
        return replace(spec, role="reward model", heads=heads, head_init=self.config.train.head_init, head_bias=False)

    def batch(self, samples: Sequence[Any], engine: TrainEngine | None = None) -> TrainingBatch:
        """See `Task.batch`."""
        return preference_batch(samples)

    def loss(self, metrics: Mapping[str, float]) -> float:
        """Mean over pairs, including centering."""
        return metrics["loss/bradley_terry"] + self.config.train.center_coefficient * metrics["loss/centering"]

    def evaluate(self, engine: TrainEngine, held_out: Table) -> Metrics:
        """Return accuracy, calibration and loss on held-out pairs."""
        pairs = held_out.take(range(len(held_out))) if isinstance(held_out, PairTable) else []
        scores = held_out_rewards(engine, pairs)
        return scores.metrics(), scores
