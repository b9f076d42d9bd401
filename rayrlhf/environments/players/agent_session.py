"""Session of an agent: the conversations of one sample as token transcripts.

A request that continues after a completion extends that completion's transcript and keeps its sampled tokens. Any other request
starts a new segment: another conversation, or the same one rewritten. All segments share the sample's reward.
"""

from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Literal

import numpy as np

from rayrlhf.data.messages import Message
from rayrlhf.data.records import SEGMENT_STRIDE, Int32, Rollout, RolloutRequest
from rayrlhf.environments.chat_tokens import ChatTokens, continues
from rayrlhf.environments.endpoint.server import Call, Completion, Refusal
from rayrlhf.environments.transcript import Transcript
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer


@dataclass(eq=False)
class Segment:
    """One append-only conversation of a sample.

    Attributes:
        transcript: its tokens.
        messages: its messages up to the last completion.
        call: the request that waits for the next completion.
        observation: tokens before that completion that the policy did not sample.
    """

    transcript: Transcript
    messages: list[Message] = field(default_factory=list)
    call: Call | None = None
    observation: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(eq=False)
class Session:
    """A running agent.

    Attributes:
        request: the requested sample.
        tokens: maximum number of tokens of a segment after its prompt.
        max_turns: maximum number of completions.
        max_turn_tokens: maximum length of a completion; None for the remaining space.
        attempt: number of earlier attempts at the sample.
        token: the bearer token.
        run: future of the agent's reward.
        since: time of its last request or completion, on the monotonic clock.
        segments: segments in the order in which they started.
        turns: number of started completions.
        refused: True after a request without space, so that an error of the agent after it is no failure.
        overdue: reason of a time-out; empty without one.
    """

    request: RolloutRequest
    tokens: int
    max_turns: int
    max_turn_tokens: int | None
    attempt: int
    token: str
    run: "Future[Any]"
    since: float
    segments: list[Segment] = field(default_factory=list)
    turns: int = 0
    refused: bool = False
    overdue: str = ""

    @property
    def waiting(self) -> bool:
        """True if a completion is being sampled."""
        return any(segment.call for segment in self.segments)

    def turn(self, call: Call, chat: ChatTokens) -> tuple[Segment, int]:
        """Return the segment of a request and the maximum length of its completion.

        Raises:
            Refusal: there is no space for another completion, or the template refuses the conversation.
        """
        if self.turns >= self.max_turns:
            raise self._full(f"the {self.max_turns} turns of environment.max_turns are used up")
        try:
            segment = self._continued(call, chat) or self._new_segment(chat.opening(call.messages))
        except UserError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, "invalid_messages", str(error)) from error
        space = self.tokens - len(segment.transcript) - len(segment.observation)
        if space < 1:
            raise self._full("the tokens of rollout.max_new_tokens are used up")
        segment.call = call
        return segment, min(space, self.max_turn_tokens or space, call.max_tokens or space)

    def count_turn(self, segment: Segment) -> None:
        """Count the turn and the segment after the rollout engine accepted the request."""
        if segment not in self.segments:
            self.segments.append(segment)
        self.turns += 1

    def full(self, error: UserError) -> Refusal:
        """Return the refusal for a full model context."""
        return self._full(str(error))

    def rollout(self, reward: float, tokenizer: Tokenizer) -> Rollout | None:
        """Return the sample, each segment ending in the reward; None without turns."""
        reason: Literal["stop", "length"] = "length" if self.refused else "stop"
        parts = []
        for segment in self.segments:
            if segment.transcript.turns:
                segment.transcript.add_reward(reward)
                parts.append(segment.transcript.rollout(reason, tokenizer))
        if not parts:
            return None
        named = [
            replace(part, key=self.request.key._replace(sample=self.request.key.sample + SEGMENT_STRIDE * at))
            for at, part in enumerate(parts)
        ]
        return replace(named[0], extra_segments=tuple(named[1:]))

    def _continued(self, call: Call, chat: ChatTokens) -> Segment | None:
        for segment in reversed(self.segments):
            if segment.call is None and continues(call.messages, segment.messages):
                observation = chat.between(call.messages, len(segment.messages), int(segment.transcript.token_ids[-1]))
                if observation is not None:
                    segment.observation = observation
                    return segment
        return None

    def _new_segment(self, opening: Int32) -> Segment:
        sample = self.request.key.sample + SEGMENT_STRIDE * len(self.segments)
        key = self.request.key._replace(sample=sample)
        return Segment(Transcript(RolloutRequest(key, opening, self.request.seed)))

    def _full(self, message: str) -> Refusal:
        self.refused = True
        return Refusal(HTTPStatus.BAD_REQUEST, "context_length_exceeded", message)


def complete(segment: Segment, turn: Rollout, version: int) -> None:
    """Append a completion to its segment and resolve the waiting request.

    Args:
        turn: completion as recorded by the rollout engine.
        version: weight version of the observation tokens before it.
    """
    call = segment.call
    if call is None:
        raise ValueError("the segment has no waiting request")
    observation = segment.observation
    segment.call, segment.observation = None, np.zeros(0, np.int32)
    if call.reply.cancelled():
        return  # The agent is not waiting any more: the completion has no part in what follows.
    segment.transcript.append_observation(observation, version)
    segment.transcript.append_turn(turn)
    segment.messages = [*call.messages, {"role": "assistant", "content": turn.text}]
    resolve(call, Completion(turn.text, turn.finish_reason, len(turn.prompt_ids), len(turn.response_ids)))


def refuse(calls: Sequence[Call], message: str) -> None:
    """Refuse requests of a session that is over."""
    for call in calls:
        resolve(call, Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "session_over", message))


def resolve(call: Call, result: Completion | Refusal) -> None:
    """End a request's wait; no effect if its client is gone."""
    with suppress(InvalidStateError):
        if isinstance(result, Refusal):
            call.reply.set_exception(result)
        else:
            call.reply.set_result(result)
