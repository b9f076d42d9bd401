"""Transcript of a multi-turn sample: sampled tokens and observation tokens.

Token in, token out: sampled ids and their log-probs go from the rollout engine into the record unchanged. Text is decoded for
the environment and never encoded again, since encoding may give other tokens than those sampled. Observations are encoded once.
"""

from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from rayrlhf.data.records import SEGMENT_STRIDE, Float32, Int32, Rollout, RolloutRequest
from rayrlhf.library_types import Tokenizer
from rayrlhf.observe.samples import Line


class Span(NamedTuple):
    """Tokens `start` to `end` (exclusive) of the response and their owner."""

    owner: Literal["policy", "environment"]
    start: int
    end: int


class Transcript:
    """A response that grows turn by turn.

    Attributes:
        spans: spans in order, without gaps.
        turns: number of turns of the policy.
    """

    def __init__(self, request: RolloutRequest) -> None:
        self.request = request
        self.spans: list[Span] = []
        self.turns = 0
        self._ids: list[Int32] = []
        self._logprobs: list[np.ndarray] = []
        self._versions: list[Int32] = []
        self._rewards: dict[int, float] = {}
        self._read = self._cached = 0
        self._constrained: list[slice] = []

    def __len__(self) -> int:
        return self.spans[-1].end if self.spans else 0

    @property
    def token_ids(self) -> Int32:
        """Prompt and response so far, int32 [P + R]: the context of the next turn."""
        return np.concatenate([self.request.prompt_ids, *self._ids])

    def append_turn(self, turn: Rollout, *, constrained: bool = False) -> None:
        """Append a turn of the policy as recorded by the rollout engine; see `Rollout.constrained`."""
        self._append("policy", turn.response_ids, turn.logprobs, turn.versions)
        if constrained:
            self._constrained.append(slice(self.spans[-1].start, self.spans[-1].end))
        self.turns += 1
        self._read += turn.read_tokens
        self._cached += turn.cached_tokens

    def append_observation(self, token_ids: Int32, version: int) -> None:
        """Append observation tokens with the current weight version.

        The version gives them the same staleness as their neighbors.
        """
        if len(token_ids):
            count = len(token_ids)
            self._append("environment", token_ids, np.zeros(count, np.float32), np.full(count, version, np.int32))

    def add_reward(self, reward: float) -> None:
        """Add a reward at the last token so far, which must be the policy's."""
        if not self.spans or self.spans[-1].owner != "policy":
            raise ValueError("a reward belongs to the end of a turn of the policy")
        last = len(self) - 1
        self._rewards[last] = self._rewards.get(last, 0.0) + reward

    def rollout(self, finish_reason: Literal["stop", "length"], tokenizer: Tokenizer) -> Rollout:
        """Return the whole sample as one record; its text has all turns and observations."""
        response = np.concatenate(self._ids).astype(np.int32)
        mask = np.zeros(len(response), dtype=np.bool_)
        for span in self.spans:
            mask[span.start : span.end] = span.owner == "policy"
        rewards = np.zeros(len(response), dtype=np.float32)
        for position, reward in self._rewards.items():
            rewards[position] = reward
        constrained = np.zeros(len(response), dtype=np.bool_)
        for part in self._constrained:
            constrained[part] = True
        return Rollout(
            key=self.request.key,
            prompt_ids=self.request.prompt_ids,
            response_ids=response,
            action_mask=mask,
            logprobs=np.concatenate(self._logprobs).astype(np.float32),
            versions=np.concatenate(self._versions).astype(np.int32),
            finish_reason=finish_reason,
            text=tokenizer.decode(response.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False),
            seed=self.request.seed,
            rewards=rewards,
            read_tokens=self._read,
            cached_tokens=self._cached,
            constrained=constrained if self._constrained else None,
        )

    def _append(
        self, owner: Literal["policy", "environment"], ids: np.ndarray, logprobs: np.ndarray, versions: np.ndarray
    ) -> None:
        start = len(self)
        self.spans.append(Span(owner, start, start + len(ids)))
        self._ids.append(ids)
        self._logprobs.append(logprobs)
        self._versions.append(versions)


def transcript_lines(rollout: Rollout, tokenizer: Tokenizer) -> list[Line]:
    """Return one line per span of a sample.

    Lines of the policy have no special tokens. The others keep them, since they set the roles of a chat template apart from its
    texts. A branch of an agent's sample begins with the tokens before it.

    Args:
        rollout: rollout of one or several turns.
    """
    branch = rollout.key.sample >= SEGMENT_STRIDE
    context = [Line("context", tokenizer.decode(rollout.prompt_ids.tolist()), 0.0)] if branch else []
    ids, mask = rollout.response_ids, rollout.action_mask
    paid = np.zeros(len(ids), np.float32) if rollout.rewards is None else rollout.rewards
    bounds = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    return context + [
        Line(
            "policy" if mask[start] else "environment",
            tokenizer.decode(
                ids[start:end].tolist(), skip_special_tokens=bool(mask[start]), clean_up_tokenization_spaces=False
            ),
            float(paid[start:end].sum()),
            end - start,
        )
        for start, end in pairwise(bounds)
    ]


def failed_rollout(request: RolloutRequest, reason: str) -> Rollout:
    """Return the record of a failed sample: no tokens, and the reason."""
    none: Int32 = np.zeros(0, np.int32)
    empty: Float32 = np.zeros(0, np.float32)
    return Rollout(
        request.key, request.prompt_ids, none, none.astype(np.bool_), empty, none, "length", "", request.seed, None, reason
    )
