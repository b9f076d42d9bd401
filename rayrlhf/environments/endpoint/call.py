"""Requests and completions in the form that all dialects of the endpoint share.

A dialect (chat completions, messages, responses) reads its own JSON into a `Call` and writes the `Completion` objects back.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal

from rayrlhf.data.messages import Message

MODEL = "policy"
"""Name of the only model; requests may give any."""
FinishReason = Literal["stop", "length", "tool_calls"]


class Refusal(Exception):
    """Reason why a request gets no completion.

    Args:
        code: OpenAI's error code, such as `context_length_exceeded`.
        param: the field at fault.
    """

    def __init__(self, status: HTTPStatus, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def invalid(param: str, message: str) -> Refusal:
    """Return the refusal of an invalid or unsupported field."""
    return Refusal(HTTPStatus.BAD_REQUEST, f"invalid_{param}", message, param)


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of a request.

    Attributes:
        text: the answer without reasoning and tool calls.
        finish_reason: "tool_calls" if it stopped with tool calls.
        prompt_tokens: tokens before it.
        completion_tokens: sampled tokens, including the stop token.
        reasoning: text of the reasoning, without its tags.
        tool_calls: in OpenAI's form {id, type, function: {name, arguments}}; the arguments are JSON text.
        tokens: text and log-prob of each sampled token; empty if they were not requested.
        stop: the request's stop string that ended it.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    reasoning: str = ""
    tool_calls: Sequence[dict[str, Any]] = ()
    tokens: Sequence[tuple[str, float]] = ()
    stop: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A waiting request.

    Attributes:
        token: bearer token of the session.
        messages: the conversation, in the form of `rayrlhf.data.messages`.
        max_tokens: the agent's limit of a completion; None for no limit of its own.
        tools: tools in OpenAI's form {type: function, function: {name, ...}}.
        template: further arguments of the chat template.
        use_tools: False for `tool_choice: none`.
        forced: name of the function that must be called, or "" if any must; None without such a constraint.
        form: JSON schema of the text; None for any text.
        parallel: a completion may have several tool calls.
        count: number of completions.
        stop: further stop strings, which are not part of the text.
        seed: mixed into the seeds of the completions.
        logprobs: return the sampled tokens with their log-probs.
        path: name of the sample's part to which the completions belong.
        reply: resolved with `count` completions, or a `Refusal` as its exception.
    """

    token: str
    messages: list[Message]
    max_tokens: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    template: Mapping[str, Any] = field(default_factory=dict)
    use_tools: bool = True
    forced: str | None = None
    form: Mapping[str, Any] | None = None
    parallel: bool = True
    count: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False
    path: str = ""
    reply: "Future[list[Completion]]" = field(default_factory=Future)

    @property
    def constrained(self) -> bool:
        """True if the completion must have a certain form."""
        return self.forced is not None or self.form is not None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the chat template."""
        return {**self.template, **({"tools": list(self.tools)} if self.tools else {})}


def resolve(call: Call, result: list[Completion] | Refusal) -> None:
    """End a request's wait; no effect if its client is gone."""
    with suppress(InvalidStateError):
        if isinstance(result, Refusal):
            call.reply.set_exception(result)
        else:
            call.reply.set_result(result)
