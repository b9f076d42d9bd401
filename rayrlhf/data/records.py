"""The records that travel between actors: prompts, requests, rollouts, sequences.

All of them are plain NumPy and Python, so that they are cheap to ship in batches and never carry weights or logits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]


SEGMENT_STRIDE = 1 << 20
"""Distance between the sample numbers of the segments of one sample; see `Rollout.others`."""


class Record:
    """A record that is pickled as its class and its fields in order: three times as fast as a dataclass pickles itself."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """How to make the record again."""
        names: tuple[str, ...] = type(self).__slots__
        return type(self), tuple([getattr(self, name) for name in names])


RecordType = TypeVar("RecordType", bound=Record)


class Records(list[RecordType]):
    """A list of records of one kind that travels as columns: arrays laid end to end, so that a message is a few buffers.

    Ray packs every array of a message apart, which costs a driver with many short arrays more than all of its own work. The
    arrays of the list that arrives are views of the columns, read-only.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """How to make the list again, from columns."""
        if not self:
            return Records, ()
        kind = type(self[0])
        names: tuple[str, ...] = kind.__slots__
        return _from_columns, (kind, tuple(_Column.of([getattr(one, name) for one in self]) for name in names))


class _Column(NamedTuple):
    """One field of all records. With `ends` the values are arrays end to end along their first axis, else a list."""

    values: Any
    ends: NDArray[np.int64] | None

    @classmethod
    def of(cls, values: list[Any]) -> "_Column":
        if not all(isinstance(value, np.ndarray) and value.ndim for value in values):
            return cls(values, None)
        return cls(np.concatenate(values), np.cumsum([len(value) for value in values]))

    def rows(self) -> list[Any]:
        if self.ends is None:
            return list(self.values)
        ends = self.ends.tolist()
        return [self.values[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _from_columns(kind: Callable[..., RecordType], columns: tuple[_Column, ...]) -> Records[RecordType]:
    return Records(map(kind, *(column.rows() for column in columns)))


class SampleKey(NamedTuple):
    """Identity of one sampled response within a run. Work is requeued and deduplicated by it."""

    step: int
    prompt: int
    """Row id of the prompt in its dataset."""
    sample: int
    """0 .. samples_per_prompt-1 within the prompt's group (ids stay unique when a prompt occurs twice in a step)."""


@dataclass(frozen=True, slots=True)
class Prompt(Record):
    """One prompt, tokenised.

    Attributes:
        id: row id in the dataset; stable over epochs and resumes.
        text: what the user wrote (the last user turn), for rewards and reports.
        token_ids: int32 [P], chat template applied.
        columns: every other column of the dataset row, for reward functions.
        context_ids: int32 [C], what the sampler reads in place of `token_ids`; None where it reads the same.
    """

    id: int
    text: str
    token_ids: Int32
    columns: dict[str, Any] = field(default_factory=dict)
    context_ids: Int32 | None = None


@dataclass(frozen=True, slots=True)
class RolloutRequest(Record):
    """One response to sample. `seed` derives from (run seed, step, prompt, sample), so a retry asks for the same thing."""

    key: SampleKey
    prompt_ids: Int32
    seed: int
    prompt: Prompt | None = None
    """The whole prompt, where an environment wants to know it."""


@dataclass(frozen=True, slots=True)
class Rollout(Record):
    """One sampled response.

    Attributes:
        key: identity.
        prompt_ids: int32 [P].
        response_ids: int32 [R], R >= 1; the stop token included when one was sampled.
        action_mask: bool [R]; True on tokens the policy sampled, False on tool or environment tokens.
        logprobs: float32 [R], the sampler's own, at the rollout temperature; 0 where `action_mask` is False.
        versions: int32 [R], weight version that sampled each token.
        finish_reason: "stop" (stop token or stop string) or "length".
        text: the response decoded without special tokens.
        seed: the request's seed.
        rewards: float32 [R], what an environment paid, at the last token of the turn that earned it; None without one.
        failure: why the environment could not play the sample; nothing is learned from it then. Empty otherwise.
        others: further segments of the same sample, where its agent began a conversation anew: each with a prompt of its own,
            the sample's reward, and a sample number `SEGMENT_STRIDE` above the one before.
    """

    key: SampleKey
    prompt_ids: Int32
    response_ids: Int32
    action_mask: Bool
    logprobs: Float32
    versions: Int32
    finish_reason: Literal["stop", "length"]
    text: str
    seed: int
    rewards: Float32 | None = None
    failure: str = ""
    extra_segments: "tuple[Rollout, ...]" = ()

    def sequence(self) -> "TokenSequence":
        """The rollout as a token sequence for scoring and training."""
        return TokenSequence(np.concatenate([self.prompt_ids, self.response_ids]), len(self.prompt_ids))


@dataclass(frozen=True, slots=True)
class TokenSequence(Record):
    """Tokens of one sample. Response token j stands at `token_ids[prompt_length + j]` and is predicted one place before.

    Attributes:
        token_ids: int32 [P + R].
        prompt_length: P >= 1.
    """

    token_ids: Int32
    prompt_length: int

    @property
    def response_length(self) -> int:
        """R, the number of response tokens."""
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True, slots=True)
class TokenScores(Record):
    """What one model says of one sequence, aligned to its response tokens. A field that was not asked for is None.

    Attributes:
        logprobs: float32 [R], log-prob of each response token at the given temperature.
        entropy: float32 [R], entropy of the distribution each response token was drawn from.
        values: float32 [R + 1], value before each response token, and last the value after the final one.
        hidden: float32 [R, H], final hidden state that predicted each response token (for the full KL).
    """

    logprobs: Float32 | None = None
    entropy: Float32 | None = None
    values: Float32 | None = None
    hidden: Float32 | None = None
