"""Session of an agent: the conversations of one sample as a tree of turns.

A request that continues after a completion keeps its sampled tokens. If that completion is the last of its segment, the segment
grows; else the request starts a branch: a new segment whose prompt has the tokens up to there. Any other request starts a new
conversation. Every sampled token is thus in the response of exactly one segment. A segment has the reward of its path.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np

from rayrlhf.data.messages import Message, standard_message
from rayrlhf.data.records import SEGMENT_STRIDE, Int32, Rollout, RolloutRequest
from rayrlhf.data.seeds import turn_seed
from rayrlhf.environments.chat_tokens import ChatTokens, Continuation, Opening, same_json, same_messages
from rayrlhf.environments.endpoint.call import Call, Completion, Refusal, invalid, resolve
from rayrlhf.environments.endpoint.output_parser import OutputParser
from rayrlhf.environments.transcript import Transcript
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer


@dataclass(eq=False)
class Turn:
    """A completion of a segment.

    Attributes:
        messages: the conversation up to and including it.
        options: arguments of the chat template.
        raw: its text with tags, up to a stop string.
        end: tokens of the segment's response up to and including it.
        last_token: token that ended it; None if it was cut.
        before: text before it; None until a request goes on after it.
    """

    messages: list[Message]
    options: dict[str, Any]
    raw: str
    end: int
    last_token: int | None
    before: Opening | None = None

    def continuation(self, call: Call, chat: ChatTokens) -> Continuation | None:
        """Return text and tokens between it and a request's completion.

        None if the template now writes the conversation before it differently.
        """
        if self.before is None:  # A render takes 0.3 ms, and the last completion of a sample needs none.
            self.before = chat.opening(self.messages[:-1], self.options)
        return chat.between(self.before, self.messages, call.messages[len(self.messages) :], call.options, self.last_token)


@dataclass(eq=False)
class Segment:
    """One append-only conversation of a sample, or the part of it after a branch.

    Attributes:
        transcript: its tokens.
        shared: tokens of its prompt after the prompt of its conversation.
        path: path of its requests.
        turns: its completions.
        waiting: a completion is being sampled.
    """

    transcript: Transcript
    shared: int = 0
    path: str = ""
    turns: list[Turn] = field(default_factory=list)
    waiting: bool = False


@dataclass(eq=False)
class Pending:
    """A completion that is being sampled.

    Attributes:
        call: its request.
        index: its number among the request's completions.
        segment: segment to which it belongs.
        observation: int32 [N], tokens between the segment's last completion and this one.
        opening: text that ends as the text before it does.
        before: text before it, if it is known.
        limit: its maximum length.
        constraint: see `RolloutRequest.constraint`.
    """

    call: Call
    index: int
    segment: Segment
    observation: Int32
    opening: str
    before: Opening | None
    limit: int
    constraint: dict[str, Any] | None

    @property
    def context(self) -> Int32:
        """All tokens before it, int32 [P]."""
        return np.concatenate([self.segment.transcript.token_ids, self.observation])


class Texts(NamedTuple):
    """Conversions between tokens, texts and messages."""

    tokenizer: Tokenizer
    chat: ChatTokens
    parser: OutputParser

    @classmethod
    def of(cls, tokenizer: Tokenizer, tool_parser: str = "auto", reasoning_parser: str = "auto") -> "Texts":
        """Return the conversions of a tokenizer.

        Args:
            tool_parser: see `rollout.tool_parser`.
            reasoning_parser: see `rollout.reasoning_parser`.

        Raises:
            UserError: the tokenizer has no chat template, or a parser does not fit it.
        """
        chat = ChatTokens(tokenizer)
        return cls(tokenizer, chat, OutputParser(tokenizer, chat, tool_parser, reasoning_parser))


@dataclass(eq=False)
class Session:
    """A running agent.

    Attributes:
        request: the requested sample.
        tokens: maximum number of tokens of a conversation after its prompt.
        max_turns: maximum number of completions.
        max_turn_tokens: maximum length of a completion; None for the remaining space.
        max_sampled_tokens: maximum sampled tokens of all completions; None for no limit.
        attempt: number of earlier attempts at the sample.
        token: the bearer token.
        run: future of the agent's reward.
        rewards: rewards by path that the agent has given while it runs.
        since: time of its last request or completion, on the monotonic clock.
        segments: segments in the order in which they started.
        pending: completions that are being sampled.
        results: sampled completions of requests that wait for more, with their places and weight versions.
        turns: number of started completions.
        sampled: sampled tokens of finished completions.
        started: number of started segments.
        refused: True after a request without space, so that an error of the agent after it is no failure.
        overdue: reason of a time-out; empty without one.
    """

    request: RolloutRequest
    tokens: int
    max_turns: int
    max_turn_tokens: int | None
    max_sampled_tokens: int | None
    attempt: int
    token: str
    run: "Future[Any]"
    rewards: Mapping[str, float]
    since: float
    segments: list[Segment] = field(default_factory=list)
    pending: list[Pending] = field(default_factory=list)
    results: dict[Call, dict[int, tuple[Pending, Rollout, int]]] = field(default_factory=dict)
    turns: int = 0
    sampled: int = 0
    started: int = 0
    refused: bool = False
    overdue: str = ""

    @property
    def waiting(self) -> bool:
        """True if a completion is being sampled."""
        return bool(self.pending)

    def open(self, call: Call, texts: Texts) -> tuple[list[Pending], int]:
        """Return the places of a request's completions in the tree and their maximum length.

        Raises:
            Refusal: there is no space for another completion, or the template refuses the conversation.
        """
        texts.parser.check(call)
        if self.turns + call.count > self.max_turns:
            raise self.full(f"the {self.max_turns} turns of environment.max_turns are used up")
        try:
            parent, turn, more = self._parent(call, texts.chat)
            before = more.before if more else texts.chat.opening(call.messages, call.options)
        except UserError as error:
            raise invalid("messages", str(error)) from error
        opening = more.text if more else before.text if before else ""
        constraint = texts.parser.constraint(call, opening)
        between = more.tokens if more else np.zeros(0, np.int32)
        if parent is None or turn is None:
            prompt, shared = texts.chat.encode(opening), 0
        else:
            earlier = parent.transcript.token_ids[: len(parent.transcript.request.prompt_ids) + turn.end]
            prompt, shared = np.concatenate([earlier, between]), parent.shared + turn.end + len(between)
        if not len(prompt):
            raise invalid("messages", "the conversation has no tokens")
        space = self.tokens - shared
        if space < 1:
            raise self.full("the tokens of rollout.max_new_tokens are used up")
        limit = min(space, self.max_turn_tokens or space, call.max_tokens or space, self._left(call.count, space))
        places = []
        grows = parent is not None and turn is parent.turns[-1] and not parent.waiting and parent.path == call.path
        for index in range(call.count):
            if grows and index == 0 and parent is not None:
                places.append(Pending(call, index, parent, between, opening, before, limit, constraint))
            else:
                segment = self._new_segment(prompt, shared, call.path)
                places.append(Pending(call, index, segment, np.zeros(0, np.int32), opening, before, limit, constraint))
        return places, limit

    def _left(self, count: int, space: int) -> int:
        """Return the sampled tokens that each of `count` completions may have; `space` without a budget."""
        if self.max_sampled_tokens is None:
            return space
        used = self.sampled + sum(place.limit for place in self.pending)
        left = (self.max_sampled_tokens - used) // count
        if left < 1:
            raise self.full(f"the {self.max_sampled_tokens} tokens of environment.max_sampled_tokens are used up")
        return left

    def start(self, places: Sequence[Pending]) -> list[RolloutRequest]:
        """Return the requests of completions, which count from now on."""
        call = places[0].call
        requests = []
        for place in places:
            seed = turn_seed(self.request.seed, self.turns)
            seed = seed if call.seed is None else turn_seed(seed, call.seed % 2**31)
            key = place.segment.transcript.request.key
            requests.append(RolloutRequest(key, place.context, seed, stop=call.stop, constraint=place.constraint))
            place.segment.waiting = True
            if place.segment not in self.segments:
                self.segments.append(place.segment)
            self.turns += 1
        self.pending += places
        return requests

    def withdraw(self, places: Sequence[Pending]) -> None:
        """Take back completions that the rollout engine does not accept."""
        for place in places:
            self.drop(place)
        self.turns -= len(places)

    def drop(self, place: Pending) -> None:
        """End the wait for a completion without a result."""
        place.segment.waiting = False
        self.pending.remove(place)

    def complete(self, place: Pending, turn: Rollout, version: int, texts: Texts) -> None:
        """Resolve a request with its last completion, and append all of them to their segments.

        If the client has disconnected, none is appended.

        Args:
            turn: completion as recorded by the rollout engine.
            version: weight version of the observation tokens before it.
        """
        call = place.call
        self.pending.remove(place)
        self.sampled += len(turn.response_ids)
        done = self.results.setdefault(call, {})
        done[place.index] = (place, turn, version)
        if len(done) < call.count:
            return  # Its segment waits until then, so that no other request continues there.
        del self.results[call]
        for one, _, _ in done.values():
            one.segment.waiting = False
        if not call.reply.cancelled():
            resolve(call, [self._append(*done[index], texts) for index in sorted(done)])

    def _append(self, place: Pending, turn: Rollout, version: int, texts: Texts) -> Completion:
        """Append a completion to its segment."""
        call, segment = place.call, place.segment
        stopped = turn.finish_reason == "stop"
        ids = texts.chat.without_end(turn.response_ids.tolist()) if stopped else turn.response_ids.tolist()
        parsed = texts.parser.parse(ids, turn.text, call, place.opening)
        several = call.parallel and texts.chat.parallel
        calls = [_with_id(one) for one in (parsed.calls if several else parsed.calls[:1])]
        message: Message = {"role": "assistant", "content": parsed.text}
        if parsed.reasoning:
            message[texts.chat.reasoning_key or "reasoning_content"] = parsed.reasoning
        if calls:
            message["tool_calls"] = calls
        segment.transcript.append_observation(place.observation, version)
        segment.transcript.append_turn(turn, constrained=place.constraint is not None)
        ended = int(turn.response_ids[-1]) if stopped else None
        messages = [*call.messages, as_template_message(message)]
        raw, end = parsed.raw or parsed.text, len(segment.transcript)
        segment.turns.append(Turn(messages, call.options, raw, end, ended, place.before))
        return Completion(
            parsed.text,
            "tool_calls" if calls and stopped else turn.finish_reason,
            len(turn.prompt_ids),
            len(turn.response_ids),
            parsed.reasoning,
            calls,
            token_texts(turn, texts.tokenizer) if call.logprobs else (),
            next((word for word in call.stop if word in turn.text), None),
        )

    def full(self, message: str) -> Refusal:
        """Return the refusal of a request without space, and note it."""
        self.refused = True
        return Refusal(HTTPStatus.BAD_REQUEST, "context_length_exceeded", message, "messages")

    @property
    def paths(self) -> set[str]:
        """Paths with a completion."""
        return {segment.path for segment in self.segments if segment.turns}

    def rollout(self, rewards: Mapping[str, float], tokenizer: Tokenizer) -> Rollout | None:
        """Return the sample, each segment ending in the reward of its path; None without turns."""
        reason: Literal["stop", "length"] = "length" if self.refused else "stop"
        parts = []
        for segment in self.segments:
            if segment.turns:
                segment.transcript.add_reward(rewards[segment.path])
                parts.append(replace(segment.transcript.rollout(reason, tokenizer), path=segment.path))
        if not parts:
            return None
        named = [
            replace(part, key=self.request.key._replace(sample=self.request.key.sample + SEGMENT_STRIDE * at))
            for at, part in enumerate(parts)
        ]
        return replace(named[0], extra_segments=tuple(named[1:]))

    def _parent(self, call: Call, chat: ChatTokens) -> tuple[Segment | None, Turn | None, Continuation | None]:
        """Return segment and turn that a request continues, with the text and tokens in between."""
        for segment, turn in self._alike(call):
            if more := turn.continuation(call, chat):
                return segment, turn, more
        return None, None, None

    def _alike(self, call: Call) -> Iterator[tuple[Segment, Turn]]:
        """Yield the turns with which a request's conversation begins.

        The longest conversation comes first, of equal ones the one without changes, then the latest.
        """
        turns = [(len(turn.messages), number, turn) for number, one in enumerate(self.segments) for turn in one.turns]
        known = sorted((one for one in turns if one[0] < len(call.messages)), key=lambda one: one[0], reverse=True)
        for size, group in groupby(known, key=lambda one: one[0]):
            found = []
            for _, number, turn in group:
                same = same_json(call.options, turn.options)
                likeness = same_messages(call.messages[:size], turn.messages, turn.raw) if same else 0
                if likeness:
                    found.append((likeness, number, turn.end, turn))
            for _, number, _, turn in sorted(found, key=lambda one: one[:3], reverse=True):
                yield self.segments[number], turn

    def _new_segment(self, prompt: Int32, shared: int, path: str) -> Segment:
        sample = self.request.key.sample + SEGMENT_STRIDE * self.started
        self.started += 1
        key = self.request.key._replace(sample=sample)
        return Segment(Transcript(RolloutRequest(key, prompt, self.request.seed)), shared, path)


def as_template_message(message: Message) -> Message:
    """Return an answer whose calls have objects as arguments, if they are JSON objects."""
    return standard_message(message, "completion")


def _with_id(call: dict[str, Any]) -> dict[str, Any]:
    return call if call["id"] else call | {"id": f"call_{secrets.token_hex(8)}"}


def token_texts(turn: Rollout, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """Return text and log-prob of each sampled token."""
    texts = [tokenizer.decode([token]) for token in turn.response_ids.tolist()]
    return list(zip(texts, turn.logprobs.tolist(), strict=True))


def refuse(calls: Sequence[Call], message: str) -> None:
    """Refuse requests of a session that is over."""
    for call in calls:
        resolve(call, Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "session_over", message))
