"""DPO as a task of the tuning loop: preference pairs and a policy.

The training engine computes the reference log-probs of all pairs before its first step and before a checkpoint is loaded, with
adapters off, so no second model is in memory. A resumed run reads them from `reference/` of its folder.
"""

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayrlhf.algorithms.losses import direct_preference_loss
from rayrlhf.config.tuning import DPOConfig
from rayrlhf.data.records import Float32
from rayrlhf.data.supervised.datasets import SliceMapper, load_preference_data, map_in_order
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.preference import NLL, DirectPreferenceObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.supervised_batches import direct_preference_batch
from rayrlhf.library_types import Tokenizer
from rayrlhf.storage.atomic import write_atomically, writing
from rayrlhf.tuning.held_out import answer_logprobs
from rayrlhf.tuning.sample_table import PairTable, Table
from rayrlhf.tuning.task import Datasets, Metrics, Task

DEFAULT_MARGIN = 0.5
"""SimPO's gamma, as TRL 1.16's `simpo_gamma`."""


@dataclass(frozen=True)
class DirectPreferenceTask(Task):
    """DPO or a relative of it, with the initial model as reference."""

    config: DPOConfig

    @property
    def objective(self) -> DirectPreferenceObjective:
        """DPO objective."""
        train = self.config.train
        if train.loss == "kto":
            raise ValueError("the loss kto has a task of its own, `UnpairedTask`")
        margin = DEFAULT_MARGIN if train.target_margin is None else train.target_margin
        return DirectPreferenceObjective(train.loss, train.beta, train.label_smoothing, margin, train.nll_weight)

    def load(self, tokenizer: Tokenizer, map_slices: SliceMapper = map_in_order) -> Datasets:
        """See `Task.load`."""
        train, held_out = load_preference_data(self.config.data, tokenizer, map_slices)
        rows = self.config.evaluation.rows
        return PairTable.of(train.samples), PairTable.of(held_out.samples[:rows]) if held_out else None, train.report

    def prepare(self, engine: TrainEngine, table: Table, folder: Path) -> Table:
        """Compute the reference log-probs of all pairs with the initial weights (see `Task.prepare`)."""
        if not self.config.train.has_reference or not isinstance(table, PairTable):
            return table
        return with_references(engine, table, folder, adapters=self.config.model.lora is not None)

    def batch(self, samples: Sequence[Any], engine: TrainEngine | None = None) -> TrainingBatch:
        """See `Task.batch`."""
        return direct_preference_batch(samples)

    def loss(self, metrics: Mapping[str, float]) -> float:
        """Mean over pairs, plus the weighted negative log-likelihood."""
        weight = self.config.train.nll_weight
        return metrics["loss/direct_preference"] + (weight * metrics[NLL] if weight else 0.0)

    def evaluate(self, engine: TrainEngine, held_out: Table) -> Metrics:
        """Loss, accuracy and rewards on held-out pairs."""
        pairs = held_out.take(range(len(held_out))) if isinstance(held_out, PairTable) else []
        answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
        found = answer_logprobs(engine, answers)
        reference = np.array([value for pair in pairs for value in pair.reference or (0.0, 0.0)], dtype=np.float32)
        lengths = torch.tensor([int(answer.loss_mask.sum()) for answer in answers])
        objective = self.objective
        terms = direct_preference_loss(
            torch.from_numpy(found - reference).view(-1, 2),
            lengths.view(-1, 2),
            loss=objective.loss,
            beta=objective.beta,
            label_smoothing=objective.label_smoothing,
            margin=objective.margin,
        )
        means = {name: float(values.mean()) for name, values in terms.statistics.items()}
        if objective.nll:
            means["nll"] = -float(found[::2].sum()) / float(lengths[::2].sum())
            means["loss/direct_preference"] += objective.nll * means["nll"]
        return {f"evaluation/{name.removesuffix('/direct_preference')}": mean for name, mean in means.items()}, None


FOLDER = "reference"


def with_references(engine: TrainEngine, table: PairTable, folder: Path, *, adapters: bool) -> PairTable:
    """Return a table with the reference's log-probs, read from the run folder or computed.

    Every worker takes part.

    Args:
        engine: engine with the initial weights.
        table: the pairs, the same on every worker.
        folder: the run folder, visible to all workers.
        adapters: the model has adapters, which are disabled.

    Raises:
        UserError: the disk is full or not writable.
    """
    path = folder / FOLDER / f"{zlib.crc32(table.answers.token_ids.tobytes()):08x}-{len(table)}.npy"
    found: list[Float32 | None] = [np.load(path) if torch.distributed.get_rank() == 0 and path.is_file() else None]
    torch.distributed.broadcast_object_list(found)
    references = found[0]
    if references is None:
        references = answer_logprobs(engine, table.answers.take(range(2 * len(table))), reference=adapters)
        if torch.distributed.get_rank() == 0:
            content = io.BytesIO()
            np.save(content, references)
            with writing(path):
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, content.getvalue())
    return replace(table, references=references)
