"""Records of SFT and reward modeling: samples, pairs, and dataset reports."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rayrlhf.data.records import Bool, Float32, Int32


@dataclass(frozen=True, slots=True)
class SupervisedSample:
    """Tokens and loss mask of one sample.

    Attributes:
        token_ids: int32 [L], L >= 1.
        loss_mask: bool [L]; True for target tokens, predicted from those before them. Never True at position 0, which has no
            prediction.
        row: number of its row in the dataset (the line of a JSONL file, else 1, 2, ...).
    """

    token_ids: Int32
    loss_mask: Bool
    row: int


@dataclass(frozen=True, slots=True)
class DistillationSample(SupervisedSample):
    """A student's sample with the teacher's outputs for its target tokens.

    Attributes:
        signal: N rows for N target tokens: `teacher_hidden` float32 [N, H], or `teacher_ids` int32 [N, K] and
            `teacher_logprobs` float32 [N, K + 1]; see `rayrlhf.models.distillation`. Empty before the teacher has run.
    """

    signal: Mapping[str, Int32 | Float32] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepSample(SupervisedSample):
    """A response whose steps have labels.

    Attributes:
        loss_mask: bool [L]; True at the last token of each step.
        right: bool [L]; True at the last token of each right step.
    """

    right: Bool


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Chosen and rejected responses, each with the prompt; masks are True on responses.

    Attributes:
        chosen: the better response.
        rejected: the worse response.
        margin: reward margin by which the better one should win; None if the dataset has no margins.
        row: number of its row in the dataset.
        reference: log-probs of both responses under the initial model, summed over their tokens, in nats; None before they are
            computed.
        label: of a single answer (KTO), which is `chosen`; `rejected` then has the same prompt and the answer of another row.
    """

    chosen: SupervisedSample
    rejected: SupervisedSample
    margin: float | None
    row: int
    reference: tuple[float, float] | None = None
    label: bool | None = None

    @property
    def answers(self) -> tuple[SupervisedSample, ...]:
        """Both responses, or the labeled one."""
        return (self.chosen, self.rejected) if self.label is None else (self.chosen,)


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """Counts of a dataset's rows by outcome; reports of parts add up with `+`.

    Attributes:
        source: file, built-in or hub name.
        rows: rows read.
        kept: samples or pairs encoded from them.
        truncated: kept samples that were cut to `data.max_length`.
        dropped: rows left out, by reason.
        tokens: of all kept samples; both responses of a pair.
        target_tokens: target tokens among them; the tokens of the responses for pairs.
        rewritten: kept rows whose prompt has other tokens alone than with its response (tokens merge across the boundary, or
            the template changes it), so that the prompts of training and inference differ.
        endless: kept samples without an end-of-sequence target, which do not teach the model to stop. Not counted for pairs.
        held_out: samples held out for evaluation, not counted as kept.
        layout: name of the format that the columns define.
        used: columns read.
        unused: columns left out.
        unwritten: keys of messages that the chat template does not write.
        further: lines of other datasets of the run.
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
    layout: str = ""
    used: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    unwritten: frozenset[str] = frozenset()
    further: tuple[str, ...] = ()

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
            self.layout or other.layout,
            self.used | other.used,
            (self.unused | other.unused) - (self.used | other.used),
            self.unwritten | other.unwritten,
            self.further + other.further,
        )

    def lines(self) -> list[str]:
        """Return totals, format and columns, and a line for each kind of change, as text."""
        share = 100 * self.target_tokens / self.tokens if self.tokens else 0.0
        lines = [
            f"{self.source}: {self.kept} of {self.rows} rows, {self.tokens} tokens, "
            f"{self.target_tokens} of them targets ({share:.0f} %)"
        ]
        if self.layout:
            unused = f"; not used: {', '.join(sorted(self.unused))}" if self.unused else ""
            lines.append(f"{self.source}: read as {self.layout}: {', '.join(sorted(self.used))}{unused}")
        return [*lines, *self.changes(), *self.further]

    def changes(self) -> list[str]:
        """Return a line for each kind of change."""
        lines = []
        if self.unwritten:
            lines.append(
                f"{self.source}: message keys that the chat template does not write: {', '.join(sorted(self.unwritten))}"
            )
        if self.truncated:
            lines.append(f"{self.source}: {self.truncated} cut to data.max_length")
        if self.held_out:
            lines.append(f"{self.source}: {self.held_out} held out for evaluation")
        if self.rewritten:
            lines.append(f"{self.source}: {self.rewritten} whose prompt has other tokens alone than with its response")
        if self.endless:
            lines.append(f"{self.source}: {self.endless} without an end-of-sequence target, which do not teach to stop")
        return lines + [f"{self.source}: {count} dropped: {reason}" for reason, count in sorted(self.dropped.items())]


def count_tokens(samples: Sequence[SupervisedSample] | Sequence[PreferencePair]) -> tuple[int, int]:
    """Return the number of tokens and of target tokens of samples or pairs."""
    parts = [part for sample in samples for part in (sample.answers if isinstance(sample, PreferencePair) else (sample,))]
    return sum(len(part.token_ids) for part in parts), sum(int(part.loss_mask.sum()) for part in parts)
