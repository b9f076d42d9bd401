"""Dataset as flat arrays, shared by all workers of a node."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rayrlhf.data.answer_format import AnswerFormat
from rayrlhf.data.records import Bool, Float32, Int32
from rayrlhf.data.supervised.datasets import PreferencePair, SupervisedSample
from rayrlhf.data.supervised.supervised_samples import DistillationSample, StepSample


@dataclass(frozen=True)
class SampleTable:
    """SFT samples end to end.

    Attributes:
        token_ids: int32 [sum of lengths].
        loss_mask: bool [sum of lengths].
        offsets: int64 [N + 1]; sample i is offsets[i]:offsets[i + 1].
        rows: int64 [N], row of each in its dataset.
    """

    token_ids: Int32
    loss_mask: Bool
    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]

    @classmethod
    def of(cls, samples: Sequence[SupervisedSample]) -> Self:
        """Return the table of some samples, at least one."""
        lengths = [len(sample.token_ids) for sample in samples]
        return cls(
            np.concatenate([sample.token_ids for sample in samples]),
            np.concatenate([sample.loss_mask for sample in samples]),
            np.cumsum([0, *lengths]),
            np.array([sample.row for sample in samples]),
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [int(length) for length in np.diff(self.offsets)]

    @property
    def longest(self) -> int:
        """Maximum tokens of one sequence."""
        return max(self.lengths)

    def take(self, indices: Iterable[int]) -> Sequence[SupervisedSample]:
        """Return samples by index, as views."""
        places = [(index, slice(self.offsets[index], self.offsets[index + 1])) for index in indices]
        return [SupervisedSample(self.token_ids[at], self.loss_mask[at], int(self.rows[index])) for index, at in places]


@dataclass(frozen=True)
class DistillationTable(SampleTable):
    """Samples of a student with the inputs and outputs of its teacher.

    Attributes:
        teacher: the same responses after the teacher's context, sample by sample.
        signal: see `DistillationSample.signal`, at the target tokens of all samples end to end; None before it is computed.
    """

    teacher: SampleTable
    signal: Mapping[str, Int32 | Float32] | None = None

    @classmethod
    def pair(cls, student: SampleTable, teacher: SampleTable) -> Self:
        """Return the table of two tables with equal rows and target tokens."""
        return cls(student.token_ids, student.loss_mask, student.offsets, student.rows, teacher)

    @property
    def longest(self) -> int:
        """Maximum tokens of one sequence, including the teacher's."""
        return max(*self.lengths, *self.teacher.lengths)

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """Offsets int64 [N + 1]; the teacher's rows of sample i are bounds[i]:bounds[i + 1]."""
        learnt = np.concatenate([[0], np.cumsum(self.loss_mask, dtype=np.int64)])
        return learnt[self.offsets]

    def take(self, indices: Iterable[int]) -> Sequence[DistillationSample]:
        """Return samples by index, as views."""
        numbers = list(indices)
        signal = self.signal or {}
        parts = [{name: rows[self.bounds[n] : self.bounds[n + 1]] for name, rows in signal.items()} for n in numbers]
        samples = super().take(numbers)
        return [
            DistillationSample(one.token_ids, one.loss_mask, one.row, part) for one, part in zip(samples, parts, strict=True)
        ]


@dataclass(frozen=True)
class StepTable(SampleTable):
    """Responses whose steps have labels.

    Attributes:
        right: bool [sum of lengths], see `StepSample.right`.
        format: text around a prompt and its steps.
    """

    right: Bool
    format: AnswerFormat

    @classmethod
    def labeled(cls, samples: Sequence[StepSample], answer_format: AnswerFormat | None = None) -> Self:
        """Return the table of some samples, at least one."""
        table = SampleTable.of(samples)
        right = np.concatenate([sample.right for sample in samples])
        return cls(table.token_ids, table.loss_mask, table.offsets, table.rows, right, answer_format or AnswerFormat())

    def take(self, indices: Iterable[int]) -> Sequence[StepSample]:
        """Return samples by index, as views."""
        numbers = list(indices)
        places = [slice(self.offsets[index], self.offsets[index + 1]) for index in numbers]
        return [
            StepSample(one.token_ids, one.loss_mask, one.row, self.right[at])
            for one, at in zip(super().take(numbers), places, strict=True)
        ]


@dataclass(frozen=True)
class PairTable:
    """Preference pairs as rows 2i (chosen) and 2i + 1 (rejected) of `answers`.

    Attributes:
        answers: 2N samples.
        margins: float32 [N]; NaN for pairs without one.
        format: text around a prompt and its response.
        references: float32 [2N], see `PreferencePair.reference`; None before they are computed.
        labels: bool [N], see `PreferencePair.label`; None for pairs.
    """

    answers: SampleTable
    margins: Float32
    format: AnswerFormat
    references: Float32 | None = None
    labels: Bool | None = None

    @classmethod
    def of(cls, pairs: Sequence[PreferencePair], answer_format: AnswerFormat | None = None) -> Self:
        """Return the table of some pairs, at least one."""
        margins = [float("nan") if pair.margin is None else pair.margin for pair in pairs]
        answers = SampleTable.of([answer for pair in pairs for answer in (pair.chosen, pair.rejected)])
        labels = None if pairs[0].label is None else np.array([bool(pair.label) for pair in pairs])
        return cls(answers, np.array(margins, dtype=np.float32), answer_format or AnswerFormat(), labels=labels)

    def __len__(self) -> int:
        return len(self.margins)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each pair, both responses together."""
        lengths = self.answers.lengths
        return [chosen + rejected for chosen, rejected in zip(lengths[::2], lengths[1::2], strict=True)]

    @property
    def token_ids(self) -> Int32:
        """Tokens of all responses with their prompts, int32 [sum of lengths]."""
        return self.answers.token_ids

    @property
    def longest(self) -> int:
        """Maximum tokens of one sequence."""
        return self.answers.longest

    def take(self, indices: Iterable[int]) -> list[PreferencePair]:
        """Return pairs by index, as views."""
        numbers = list(indices)
        answers = self.answers.take(chain.from_iterable((2 * index, 2 * index + 1) for index in numbers))
        return [
            PreferencePair(
                answers[2 * place],
                answers[2 * place + 1],
                None if np.isnan(self.margins[index]) else float(self.margins[index]),
                answers[2 * place].row,
                None if self.references is None else (float(self.references[2 * index]), float(self.references[2 * index + 1])),
                None if self.labels is None else bool(self.labels[index]),
            )
            for place, index in enumerate(numbers)
        ]


Table = SampleTable | PairTable


def table_of(samples: Sequence[SupervisedSample] | Sequence[PreferencePair]) -> Table:
    """Return the table of some samples, at least one, all of one class."""
    steps = [sample for sample in samples if isinstance(sample, StepSample)]
    if steps:
        return StepTable.labeled(steps)
    pairs = [sample for sample in samples if isinstance(sample, PreferencePair)]
    return PairTable.of(pairs) if pairs else SampleTable.of([one for one in samples if isinstance(one, SupervisedSample)])
