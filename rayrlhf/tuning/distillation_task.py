"""Distillation as a task of the tuning loop: SFT samples with a teacher's distributions."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayrlhf.config.tuning import DistillationConfig
from rayrlhf.data.supervised.datasets import SampleDataset, SliceMapper, SupervisedSample, load_supervised_data, map_in_order
from rayrlhf.data.supervised.supervised_samples import count_tokens
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.objectives.supervised import DistillationObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.supervised_batches import HIDDEN, IDS, LOGPROBS, distillation_batch, supervised_sequence
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer
from rayrlhf.models.distillation import FullTeacher, Teacher, TopTeacher, divergence
from rayrlhf.tuning.held_out import shared_scores
from rayrlhf.tuning.sample_table import DistillationTable, SampleTable, Table
from rayrlhf.tuning.task import Datasets, Metrics, SupervisedTask
from rayrlhf.tuning.teacher import with_teacher

MISMATCH = "the response has other tokens behind the teacher's context"
NO_CONTEXT = "no sample of the teacher (see the lines above)"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillationTask(SupervisedTask):
    """Forward KL from the initial model, which reads `data.context_field` instead of the prompt."""

    config: DistillationConfig

    @property
    def objective(self) -> DistillationObjective:
        """Distillation objective."""
        return DistillationObjective()

    def load(self, tokenizer: Tokenizer, map_slices: SliceMapper = map_in_order) -> Datasets:
        """Read the student's and the teacher's samples, and keep the rows of both; see `Task.load`."""
        data = self.config.data
        field = {"prompt_field": data.context_field}
        evaluation = data.evaluation.model_copy(update=field) if data.evaluation is not None else None
        read = data.model_copy(update={"train": data.train.model_copy(update=field), "evaluation": evaluation})
        students = load_supervised_data(data, tokenizer, map_slices)
        teachers = load_supervised_data(read, tokenizer, map_slices)
        train = _joined(students[0], teachers[0])
        held_out = None
        if students[1] is not None and teachers[1] is not None:
            held_out = _table(_joined(students[1], teachers[1]), self.config.evaluation.rows)
        return _table(train), held_out, train[0].report

    def prepare(self, engine: TrainEngine, table: Table, folder: Path) -> Table:
        """Compute the teacher's outputs at all responses with the initial weights (see `Task.prepare`)."""
        if not isinstance(table, DistillationTable):
            raise TypeError(f"expected a table with what the teacher read, found {type(table).__name__}")
        return with_teacher(
            engine,
            table,
            folder,
            vocabulary=self.config.train.vocabulary,
            adapters=self.config.model.lora is not None,
        )

    def batch(self, samples: Sequence[Any], engine: TrainEngine | None = None) -> TrainingBatch:
        """See `Task.batch`."""
        return distillation_batch(samples)

    def loss(self, metrics: Mapping[str, float]) -> float:
        """Mean KL per response token, in nats."""
        return metrics["loss/distillation"]

    def evaluate(self, engine: TrainEngine, held_out: Table) -> Metrics:
        """Return the same mean on held-out responses."""
        samples = held_out.take(range(len(held_out))) if isinstance(held_out, DistillationTable) else []
        sequences = [supervised_sequence(sample) for sample in samples]
        states = shared_scores(engine, sequences, "hidden")
        weight, bias = engine.output_layer()
        layer = engine.teacher_layer
        total = 0.0
        for sample, state in zip(samples, states, strict=True):
            hidden = torch.from_numpy(state[sample.loss_mask[-len(state) :]])
            total += float(divergence(hidden, weight, bias, _teacher(sample.signal, layer)).sum(dtype=torch.float64))
        return {"evaluation/loss": total / count_tokens(samples)[1]}, None


def _teacher(signal: Mapping[str, np.ndarray], layer: tuple[torch.Tensor, torch.Tensor | None] | None) -> Teacher:
    if HIDDEN in signal and layer is not None:
        weight, bias = layer
        return FullTeacher(torch.from_numpy(np.array(signal[HIDDEN])), weight.cpu(), None if bias is None else bias.cpu())
    return TopTeacher(torch.from_numpy(signal[IDS].astype(np.int64)), torch.from_numpy(np.array(signal[LOGPROBS])))


_Joined = tuple[SampleDataset[SupervisedSample], list[SupervisedSample]]


def _joined(students: SampleDataset[SupervisedSample], teachers: SampleDataset[SupervisedSample]) -> _Joined:
    """Return the samples that student and teacher share, and a report of those left out.

    Both must have the same target tokens.

    Raises:
        UserError: nothing is left.
    """
    read = {sample.row: sample for sample in teachers.samples}
    kept, dropped = [], dict(students.report.dropped)
    for sample in students.samples:
        other = read.get(sample.row)
        if other is not None and np.array_equal(other.token_ids[other.loss_mask], sample.token_ids[sample.loss_mask]):
            kept.append((sample, other))
        else:
            reason = NO_CONTEXT if other is None else MISMATCH
            dropped[reason] = dropped.get(reason, 0) + 1
    source = students.report.source
    if not kept:
        raise UserError(f"{source}: no row is left: {', '.join(f'{count} {reason}' for reason, count in dropped.items())}")
    if len(kept) < len(students.samples):
        _logger.warning("%s: %d of %d responses are left out", source, len(students.samples) - len(kept), len(students.samples))
    own = [sample for sample, _ in kept]
    tokens, targets = count_tokens(own)
    report = replace(students.report, kept=len(kept), dropped=dropped, tokens=tokens, target_tokens=targets)
    return replace(students, samples=own, report=report), [other for _, other in kept]


def _table(joined: _Joined, rows: int | None = None) -> DistillationTable:
    student, teacher = joined
    return DistillationTable.pair(SampleTable.of(student.samples[:rows]), SampleTable.of(teacher[:rows]))
