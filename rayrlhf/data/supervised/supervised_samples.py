"""The records of SFT and reward modelling: samples with the tokens to learn, pairs of them, and what became of the rows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rayrlhf.data.records import Bool, Float32, Int32


@dataclass(frozen=True, slots=True)
class SupervisedSample:
    """Tokens of one sample and which of them are learnt.

    Attributes:
        token_ids: int32 [L], L >= 1.
        loss_mask: bool [L]; True: the token is a target, predicted from those before it. Never at position 0, which nothing
            predicts.
        row: number of its row in the dataset, as messages name it (the line of a JSONL file, else 1, 2, ...).
    """

    token_ids: Int32
    loss_mask: Bool
    row: int


@dataclass(frozen=True, slots=True)
class DistillationSample(SupervisedSample):
    """A sample as the student reads it, with what a teacher said of its tokens to learn.

    Attributes:
        signal: N rows for N tokens to learn: `teacher_hidden` float32 [N, H], or `teacher_ids` int32 [N, K] beside
            `teacher_logprobs` float32 [N, K + 1]; see `rayrlhf.models.distillation`. Empty where nobody asked the teacher.
    """

    signal: Mapping[str, Int32 | Float32] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, the better and the worse, each with its prompt in front; masks are True on the answers.

    Attributes:
        chosen: the better one.
        rejected: the worse one.
        margin: by how much the better one should win, in units of reward; None where the dataset has no margins.
        row: number of its row in the dataset.
        reference: log-probs of both answers under the model that training began with, summed over their tokens, in nats; None
            where nobody computed them.
    """

    chosen: SupervisedSample
    rejected: SupervisedSample
    margin: float | None
    row: int
    reference: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """What became of a dataset's rows, so that nothing is lost in silence. Reports of parts add up with `+`.

    Attributes:
        source: file, built-in or hub name.
        rows: rows read.
        kept: samples or pairs made of them.
        truncated: of those kept, how many were cut to `data.max_length`.
        dropped: rows left out, by reason.
        tokens: of all kept samples; both of a pair.
        target_tokens: of them, the tokens to learn; for pairs the tokens of the answers.
        rewritten: kept rows with a prompt that reads differently alone than with its answer behind it (tokens merge across the
            border, or the template changes it), so that the model trains on another prompt than it will meet.
        endless: kept samples that learn no end-of-sequence token; they do not teach the model to stop. Not counted for pairs.
        held_out: samples that went to evaluation and are not among those kept.
    """

    source: str
    rows: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    tokens: int = 0
    target_tokens: int = 0
    rewritten: int = 0
    endless: int = 0
    held_out: int = 0

    def __add__(self, other: "DatasetReport") -> "DatasetReport":
        return DatasetReport(
            self.source,
            self.rows + other.rows,
            self.kept + other.kept,
            self.truncated + other.truncated,
            dict(Counter(self.dropped) + Counter(other.dropped)),
            self.tokens + other.tokens,
            self.target_tokens + other.target_tokens,
            self.rewritten + other.rewritten,
            self.endless + other.endless,
            self.held_out + other.held_out,
        )

    def lines(self) -> list[str]:
        """Return the report for people: one line of totals, and one for each thing that was cut or left out."""
        share = 100 * self.target_tokens / self.tokens if self.tokens else 0.0
        lines = [
            f"{self.source}: {self.kept} of {self.rows} rows, {self.tokens} tokens, "
            f"{self.target_tokens} of them to learn ({share:.0f} %)"
        ]
        if self.truncated:
            lines.append(f"{self.source}: {self.truncated} cut to data.max_length")
        if self.held_out:
            lines.append(f"{self.source}: {self.held_out} held out for evaluation")
        if self.rewritten:
            lines.append(f"{self.source}: {self.rewritten} whose prompt has other tokens alone than with its answer behind it")
        if self.endless:
            lines.append(f"{self.source}: {self.endless} that learn no end-of-sequence token, and so do not teach to stop")
        return lines + [f"{self.source}: {count} dropped: {reason}" for reason, count in sorted(self.dropped.items())]


def count_tokens(samples: Sequence[SupervisedSample] | Sequence[PreferencePair]) -> tuple[int, int]:
    """Return all tokens of samples or pairs, and the tokens to learn among them."""
    parts = [
        part
        for sample in samples
        for part in ((sample.chosen, sample.rejected) if isinstance(sample, PreferencePair) else (sample,))
    ]
    return sum(len(part.token_ids) for part in parts), sum(int(part.loss_mask.sum()) for part in parts)
