"""DPO as a task of the tuning loop: preference pairs and a policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayrlhf.algorithms.losses import direct_preference_loss
from rayrlhf.config.tuning import DPOConfig
from rayrlhf.data.supervised.datasets import SliceMapper, load_preference_data, map_in_order
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.preference import DirectPreferenceObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.engines.train.supervised_batches import direct_preference_batch
from rayrlhf.library_types import Tokenizer
from rayrlhf.tuning.held_out import PreferenceScores, answer_logprobs
from rayrlhf.tuning.pair_reference import with_references
from rayrlhf.tuning.sample_table import PairTable, Table
from rayrlhf.tuning.task import Datasets, tuning_spec


@dataclass(frozen=True)
class DirectPreferenceTask:
    """DPO with the initial model as reference."""

    config: DPOConfig

    @property
    def objective(self) -> DirectPreferenceObjective:
        """DPO objective."""
        train = self.config.train
        return DirectPreferenceObjective(train.loss, train.beta, train.label_smoothing)

    def load(self, tokenizer: Tokenizer, map_slices: SliceMapper = map_in_order) -> Datasets:
        """See `Task.load`."""
        train, held_out = load_preference_data(self.config.data, tokenizer, map_slices)
        rows = self.config.evaluation.rows
        return PairTable.of(train.samples), PairTable.of(held_out.samples[:rows]) if held_out else None, train.report

    def spec(self, total_steps: int) -> TrainEngineSpec:
        """See `Task.spec`."""
        return tuning_spec(self.config, total_steps)

    def prepare(self, engine: TrainEngine, table: Table, folder: Path) -> Table:
        """Compute the reference log-probs of all pairs with the initial weights (see `Task.prepare`)."""
        if self.config.train.reference == "none" or not isinstance(table, PairTable):
            return table
        return with_references(engine, table, folder, adapters=self.config.model.lora is not None)

    def batch(self, samples: Sequence[Any]) -> TrainingBatch:
        """See `Task.batch`."""
        return direct_preference_batch(samples)

    def loss(self, metrics: Mapping[str, float]) -> float:
        """Mean over pairs."""
        return metrics["loss/direct_preference"]

    def evaluate(self, engine: TrainEngine, held_out: Table) -> tuple[dict[str, float], PreferenceScores | None]:
        """Loss, accuracy and rewards on held-out pairs."""
        pairs = held_out.take(range(len(held_out))) if isinstance(held_out, PairTable) else []
        answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
        found = answer_logprobs(engine, answers)
        reference = np.array([value for pair in pairs for value in pair.reference or (0.0, 0.0)], dtype=np.float32)
        lengths = torch.tensor([int(answer.loss_mask.sum()) for answer in answers])
        train = self.config.train
        terms = direct_preference_loss(
            torch.from_numpy(found - reference).view(-1, 2),
            lengths.view(-1, 2),
            loss=train.loss,
            beta=train.beta,
            label_smoothing=train.label_smoothing,
        )
        means = {name: float(values.mean()) for name, values in terms.statistics.items()}
        return {f"evaluation/{name.removesuffix('/direct_preference')}": mean for name, mean in means.items()}, None
