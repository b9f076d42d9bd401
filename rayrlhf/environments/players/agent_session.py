"""One sample of an agent: the conversations that it leads with the policy, as transcripts of tokens. Pure but for the template.

A request that goes on from an answer continues that answer's transcript, its sampled tokens as they are. Any other begins a
segment of its own: another conversation, or the same one rewritten. All segments share the sample's reward.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Literal

import numpy as np

from rayrlhf.config.library_types import Tokenizer
from rayrlhf.data.records import SEGMENT_STRIDE, Int32, Rollout, RolloutRequest
from rayrlhf.data.templates import Message
from rayrlhf.environments.chat_server import Call, Completion, Refusal
from rayrlhf.environments.chat_tokens import ChatTokens, goes_on
from rayrlhf.environments.transcript import Transcript
from rayrlhf.errors import UserError


@dataclass(eq=False)
class Segment:
    """One conversation of a sample, which only grew.

    Attributes:
        transcript: its tokens.
        messages: up to the last answer.
        call: the request that waits for the next answer.
        heard: tokens that stand before that answer and are none of the policy's.
    """

    transcript: Transcript
    messages: list[Message] = field(default_factory=list)
    call: Call | None = None
    heard: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(eq=False)
class Session:
    """An agent at work.

    Attributes:
        request: the sample that was asked for.
        tokens: most tokens of a segment behind its prompt.
        max_turns: answers that the agent may have.
        max_turn_tokens: longest answer; None for what there is room for.
        attempt: how often the sample has been begun before.
        token: the bearer token.
        run: what the agent will say.
        since: when it was last heard or answered, on the monotonic clock.
        segments: in the order in which they began.
        turns: answers begun.
        refused: a request had no room any more, so that what the agent does then is not its failure.
        overdue: why it was given up; empty while it was not.
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
        """Whether an answer is on its way."""
        return any(segment.call for segment in self.segments)

    def turn(self, call: Call, chat: ChatTokens) -> tuple[Segment, int]:
        """Return the segment that a request belongs to, ready for an answer, and how long that may be.

        Raises:
            Refusal: there is no room for another answer, or the template refuses the conversation.
        """
        if self.turns >= self.max_turns:
            raise self._full(f"the {self.max_turns} turns of environment.max_turns are used up")
        try:
            segment = self._continued(call, chat) or self._begun(chat.opening(call.messages))
        except UserError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, "invalid_messages", str(error)) from error
        room = self.tokens - len(segment.transcript) - len(segment.heard)
        if room < 1:
            raise self._full("the tokens of rollout.max_new_tokens are used up")
        segment.call = call
        return segment, min(room, self.max_turn_tokens or room, call.max_tokens or room)

    def sampled(self, segment: Segment) -> None:
        """Take note that the sampler has taken the request of a segment: from here on the segment and the turn count."""
        if segment not in self.segments:
            self.segments.append(segment)
        self.turns += 1

    def full(self, error: UserError) -> Refusal:
        """A sampler's word that the model's context is used up, for the agent."""
        return self._full(str(error))

    def rollout(self, reward: float, tokenizer: Tokenizer) -> Rollout | None:
        """Return the whole sample, the reward paid at the end of each segment; None where the policy never spoke."""
        reason: Literal["stop", "length"] = "length" if self.refused else "stop"
        parts = []
        for segment in self.segments:
            if segment.transcript.turns:
                segment.transcript.earn(reward)
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
            if segment.call is None and goes_on(call.messages, segment.messages):
                heard = chat.between(call.messages, len(segment.messages), int(segment.transcript.token_ids[-1]))
                if heard is not None:
                    segment.heard = heard
                    return segment
        return None

    def _begun(self, opening: Int32) -> Segment:
        sample = self.request.key.sample + SEGMENT_STRIDE * len(self.segments)
        key = self.request.key._replace(sample=sample)
        return Segment(Transcript(RolloutRequest(key, opening, self.request.seed)))

    def _full(self, message: str) -> Refusal:
        self.refused = True
        return Refusal(HTTPStatus.BAD_REQUEST, "context_length_exceeded", message)


def answered(segment: Segment, turn: Rollout, version: int) -> None:
    """Put what the policy said into its segment, and give it to the agent that waits.

    Args:
        segment: with its request.
        turn: as the sampler recorded it.
        version: weight version that what stands before it goes by.
    """
    call = segment.call
    if call is None:
        raise ValueError("nobody asked for this answer")
    segment.transcript.hear(segment.heard, version)
    segment.transcript.say(turn)
    segment.messages = [*call.messages, {"role": "assistant", "content": turn.text}]
    segment.call, segment.heard = None, np.zeros(0, np.int32)
    call.reply.set_result(Completion(turn.text, turn.finish_reason, len(turn.prompt_ids), len(turn.response_ids)))


def refuse(calls: Sequence[Call], message: str) -> None:
    """Tell requests that nobody will answer them."""
    for call in calls:
        if not call.reply.done():
            call.reply.set_exception(Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "session_over", message))
