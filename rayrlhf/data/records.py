"""Records exchanged between actors: prompts, requests, rollouts, token sequences.

All are plain NumPy and Python, so that they are cheap to send in batches and never carry weights or logits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from rayrlhf.data.expert_ids import ExpertIds

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]


SEGMENT_STRIDE = 1 << 20
"""Distance between the sample numbers of the segments of one sample; see `Rollout.extra_segments`."""


class Record:
    """Base class of records that pickle three times as fast as a dataclass."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """Return constructor and arguments of the record."""
        names: tuple[str, ...] = type(self).__slots__
        return type(self), tuple([getattr(self, name) for name in names])


RecordType = TypeVar("RecordType", bound=Record)


class Records(list[RecordType]):
    """A list of records of one class that is serialized as a few concatenated columns.

    Ray packs every array of a message separately, which costs a driver with many short arrays more than all of its own work.
    The arrays of a received list are read-only views of the columns.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Return constructor and columns of the list."""
        if not self:
            return Records, ()
        kind = type(self[0])
        names: tuple[str, ...] = kind.__slots__
        return _from_columns, (kind, tuple(_Column.of([getattr(one, name) for one in self]) for name in names))


class _Column(NamedTuple):
    """One field of all records: concatenated arrays with their `ends`, or a list."""

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
    """Identity of a sampled response within a run, the key for requeueing and deduplication."""

    step: int
    prompt: int
    """Row id of the prompt in its dataset."""
    sample: int
    """0 .. samples_per_prompt-1 within the prompt's group (ids stay unique when a prompt occurs twice in a step)."""


@dataclass(frozen=True, slots=True)
class Prompt(Record):
    """A tokenized prompt.

    Attributes:
        id: row id in the dataset; stable across epochs and resumes.
        text: the last user turn, for rewards and reports.
        token_ids: int32 [P], chat template applied.
        columns: all other columns of the dataset row, for reward functions.
        context_ids: int32 [C], input of the rollout engine in place of `token_ids`; None where it is the same.
        messages: the conversation as {role, content}, for a prompt that the dataset has in this form.
    """

    id: int
    text: str
    token_ids: Int32
    columns: dict[str, Any] = field(default_factory=dict)
    context_ids: Int32 | None = None
    messages: list[dict[str, str]] | None = None


@dataclass(frozen=True, slots=True)
class RolloutRequest(Record):
    """A request for one response.

    `seed` is derived from (run seed, step, prompt, sample), so a retry is the same request.
    """

    key: SampleKey
    prompt_ids: Int32
    seed: int
    prompt: Prompt | None = None
    """The whole prompt, for environments."""
    stop: tuple[str, ...] = ()
    """Stop strings besides those of the rollout engine."""
    constraint: dict[str, Any] | None = None
    """Form of the response, as arguments of vLLM's `StructuredOutputsParams`; only for engines with `constrains`."""
    reference_share: float = 0.0
    """Share of the reference in the geometric mixture to sample from: 0 is the policy, 1 the reference. Other values than 0 are
    for engines that hold a reference (`RolloutSpec.reference`)."""


@dataclass(frozen=True, slots=True)
class Rollout(Record):
    """One sampled response.

    Attributes:
        key: identity.
        prompt_ids: int32 [P].
        response_ids: int32 [R], R >= 1; the stop token included when one was sampled.
        action_mask: bool [R]; True on tokens the policy sampled, False on tool or environment tokens.
        logprobs: float32 [R], of the rollout engine, at the rollout temperature; 0 where `action_mask` is False. They are those
            of the sampled distribution: under a constraint, of the allowed tokens.
        versions: int32 [R], weight version that sampled each token.
        finish_reason: "stop" (stop token or stop string) or "length".
        text: the response decoded without special tokens.
        seed: the request's seed.
        rewards: float32 [R], environment rewards, each at the last token of its turn; None without an environment.
        failure: reason why the environment could not play the sample, which is then not trained on; empty otherwise.
        extra_segments: further segments of the same sample, where its agent started a new conversation: each has its own
            prompt, the reward of its path, and a sample number `SEGMENT_STRIDE` above the previous one.
        read_tokens: prompt tokens of the requests that sampled it; 0 where the engine has no prefix cache.
        cached_tokens: of these, tokens that the prefix cache held.
        path: the agent's name for this part of the sample.
        constrained: bool [R], True on tokens sampled under a constraint; None without any.
        experts: [P + R, layers, experts per token], chosen while it was sampled, or for its old log-probs; None without
            `rollout.routing_replay`.
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
    read_tokens: int = 0
    cached_tokens: int = 0
    path: str = ""
    constrained: Bool | None = None
    experts: ExpertIds | None = None

    def sequence(self) -> "TokenSequence":
        """The rollout as a token sequence for scoring and training."""
        return TokenSequence(np.concatenate([self.prompt_ids, self.response_ids]), len(self.prompt_ids), self.experts)


@dataclass(frozen=True, slots=True)
class TokenSequence(Record):
    """Token ids of one sample, prompt and response.

    Response token j is `token_ids[prompt_length + j]`; the position before it predicts it.

    Attributes:
        token_ids: int32 [P + R].
        prompt_length: P >= 1.
        experts: [P + R, layers, experts per token], for a network that replays them; None for its own choice.
    """

    token_ids: Int32
    prompt_length: int
    experts: ExpertIds | None = None

    @property
    def response_length(self) -> int:
        """R, the number of response tokens."""
        return len(self.token_ids) - self.prompt_length


@dataclass(frozen=True, slots=True)
class TokenScores(Record):
    """Outputs of one model for one sequence, aligned to its response tokens.

    A field that was not requested is None.

    Attributes:
        logprobs: float32 [R], log-prob of each response token at the given temperature, in nats.
        entropy: float32 [R], entropy in nats of the distribution each response token was drawn from.
        values: float32 [R + 1], value before each response token, and last the value after the final one.
        hidden: float32 [R, H], final hidden state that predicted each response token (for the full KL).
        teacher_ids: int32 [R, K], most likely tokens at each response token.
        teacher_logprobs: float32 [R, K + 1], their log-probs, and in the last column that of all others together.
        experts: [P + R, layers, experts per token], those that a network that replays routing chose.
    """

    logprobs: Float32 | None = None
    entropy: Float32 | None = None
    values: Float32 | None = None
    hidden: Float32 | None = None
    teacher_ids: Int32 | None = None
    teacher_logprobs: Float32 | None = None
    experts: ExpertIds | None = None
