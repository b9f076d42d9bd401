"""KTO as a task of the tuning loop: labeled answers and a policy.

Each answer has a partner, its prompt with the answer of the next row. Before an optimizer step, the log-ratios of all partners
of the step give the KL of the policy from the reference, so that it does not depend on how the step is cut.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayrlhf.algorithms.losses import unpaired_preference_loss
from rayrlhf.config.tuning import DPOConfig
from rayrlhf.data.supervised.datasets import SliceMapper, load_preference_data, map_in_order
from rayrlhf.data.supervised.supervised_samples import PreferencePair, SupervisedSample
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.preference import UnpairedPreferenceObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.supervised_batches import unpaired_batch
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer
from rayrlhf.tuning.direct_preference_task import with_references
from rayrlhf.tuning.held_out import answer_logprobs
from rayrlhf.tuning.sample_table import PairTable, Table
from rayrlhf.tuning.task import Datasets, Metrics, Task


@dataclass(frozen=True)
class UnpairedTask(Task):
    """KTO with the initial model as reference."""

    config: DPOConfig

    @property
    def objective(self) -> UnpairedPreferenceObjective:
        """KTO objective."""
        train = self.config.train
        return UnpairedPreferenceObjective(train.beta, train.desirable_weight, train.undesirable_weight)

    def load(self, tokenizer: Tokenizer, map_slices: SliceMapper = map_in_order) -> Datasets:
        """See `Task.load`; a pair gives two answers."""
        train, held_out = load_preference_data(self.config.data, tokenizer, map_slices, labels=True)
        longest, rows = self.config.data.max_length, self.config.evaluation.rows
        table = PairTable.of(with_partners(train.samples, longest, train.report.source))
        kept = PairTable.of(with_partners(held_out.samples[:rows], longest, held_out.report.source)) if held_out else None
        return table, kept, train.report

    def prepare(self, engine: TrainEngine, table: Table, folder: Path) -> Table:
        """Compute the reference log-probs of all answers with the initial weights (see `Task.prepare`)."""
        if not isinstance(table, PairTable):
            return table
        return with_references(engine, table, folder, adapters=self.config.model.lora is not None)

    def batch(self, samples: Sequence[Any], engine: TrainEngine | None = None) -> TrainingBatch:
        """See `Task.batch`."""
        if engine is None:
            raise ValueError("a batch of KTO needs the engine, for the KL of the policy")
        return unpaired_batch(samples, batch_kl(engine, samples))

    def loss(self, metrics: Mapping[str, float]) -> float:
        """Mean over answers."""
        return metrics["loss/kto"]

    def evaluate(self, engine: TrainEngine, held_out: Table) -> Metrics:
        """Loss, accuracy and KL on held-out answers."""
        pairs = held_out.take(range(len(held_out))) if isinstance(held_out, PairTable) else []
        found = answer_logprobs(engine, [pair.chosen for pair in pairs]) - _references(pairs, 0)
        level = torch.full((len(pairs),), batch_kl(engine, pairs))
        train = self.config.train
        terms = unpaired_preference_loss(
            torch.from_numpy(found),
            torch.tensor([bool(pair.label) for pair in pairs]),
            level,
            beta=train.beta,
            desirable_weight=train.desirable_weight,
            undesirable_weight=train.undesirable_weight,
        )
        means = {name: float(values.mean()) for name, values in terms.statistics.items()}
        return {f"evaluation/{name.removesuffix('/kto')}": mean for name, mean in means.items()}, None


def batch_kl(engine: TrainEngine, pairs: Sequence[PreferencePair]) -> float:
    """Return the KL from the reference in nats per answer, at least 0.

    Every worker takes part and gets the same result.

    Args:
        engine: engine with the current weights.
        pairs: labeled answers with their partners, the same on every worker.
    """
    found = answer_logprobs(engine, [pair.rejected for pair in pairs]) - _references(pairs, 1)
    return float(np.maximum(found.mean(dtype=np.float64), 0.0))  # unlike max, keeps a NaN


def _references(pairs: Sequence[PreferencePair], side: int) -> np.ndarray:
    return np.array([pair.reference[side] if pair.reference else 0.0 for pair in pairs], dtype=np.float32)


def with_partners(samples: Sequence[PreferencePair], longest: int, source: str) -> list[PreferencePair]:
    """Return labeled answers, each with the answer of the next one to its own prompt.

    Args:
        samples: labeled answers, or pairs, whose chosen answers are desirable and whose rejected ones are not.
        longest: maximum tokens of a partner, which is cut behind.
        source: name of the dataset, for error messages.

    Raises:
        UserError: there is one answer only.
    """
    chosen = [(pair.chosen, True if pair.label is None else pair.label) for pair in samples]
    answers = chosen + [(pair.rejected, False) for pair in samples if pair.label is None]
    if len(answers) < 2:
        raise UserError(f"{source}: KTO estimates its KL on answers of other rows; expected two answers or more, found one")
    others = [answer for answer, _ in answers[1:]] + [answers[0][0]]
    return [
        PreferencePair(answer, _partner(answer, other, longest), None, answer.row, label=label)
        for (answer, label), other in zip(answers, others, strict=True)
    ]


def _partner(own: SupervisedSample, other: SupervisedSample, longest: int) -> SupervisedSample:
    start, begin = int(own.loss_mask.argmax()), int(other.loss_mask.argmax())
    ids = np.concatenate([own.token_ids[:start], other.token_ids[begin:]])[:longest]
    mask = np.concatenate([np.zeros(start, dtype=np.bool_), other.loss_mask[begin:]])[:longest]
    return SupervisedSample(ids, mask, own.row)
