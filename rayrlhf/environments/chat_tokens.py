"""Tokens of chat conversations in which completions keep their sampled tokens.

A chat client sends the whole conversation with every request. The first request is rendered by the chat template and encoded. A
later one that continues after a completion is not encoded again; only the text after the completion is (its end, the new
messages, the header of the next completion). That text is found by rendering the conversation with a mark in place of the
completion, so blanks, the order of JSON keys and a second tool call in it have no effect. Templates that rewrite earlier
messages, or drop a completion's reasoning, allow no continuation; such a request starts a new segment.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np

from rayrlhf.data.messages import Message
from rayrlhf.data.records import Int32
from rayrlhf.data.templates import REASONING, render, require_chat_template
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer

_NAME = "probe_tool"
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "probe",
        "parameters": {"type": "object", "properties": {"value": {"type": "string"}}, "required": ["value"]},
    },
}
"""Tool for checks of templates and parsers."""
MAX_HEADERS = 256
"""Maximum headers of completions that are kept, one for each kind of conversation."""
_QUESTION = {"role": "user", "content": "question"}


class Opening(NamedTuple):
    """Text of a conversation up to a completion.

    Attributes:
        text: with the header of the completion.
        base: without the text that the template writes only before a completion; up to the previous completion if there is
            `rest`.
        rest: text after the previous completion, without the header.
    """

    text: str
    base: str
    rest: str = ""

    def end_in(self, text: str) -> int:
        """Return where this conversation ends in a longer one's text; -1 if that begins differently."""
        at = text.find(self.rest, len(self.base)) if text.startswith(self.base) else -1
        return at + len(self.rest) if at >= 0 else -1


class Continuation(NamedTuple):
    """Text and tokens after a completion in a conversation that continues.

    Attributes:
        tokens: int32 [N], up to the next completion.
        text: the whole conversation with a mark in place of the completion; it ends as the opening of the next one does.
        before: text before the next completion; None if a render must find it.
    """

    tokens: Int32
    text: str
    before: Opening | None = None


class ChatTokens:
    """Encoder of conversations with one tokenizer's chat template.

    Attributes:
        writes_tools: the template writes tools and tool calls.
        parallel: it writes several calls of one answer.
        reasoning_key: key of a message from which the template reads reasoning; None if it reads none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Probe the template.

        Raises:
            UserError: the tokenizer has no chat template, or the template refuses a question with an answer.
        """
        require_chat_template(tokenizer)
        self._tokenizer = tokenizer
        # Drawn per process, so that no text of an agent contains it.
        self._mark = f"mark{secrets.token_hex(12)}"
        self.special_ids = frozenset(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._specials = [text for index in self.special_ids if (text := tokenizer.decode([index]))]
        self._headers: dict[tuple[str, str], str] = {}
        self._as_text = False
        answer = {"role": "assistant", "content": "answer"}
        self._render([_QUESTION, answer], {}, whole=True)
        self.reasoning_key = next((key for key in REASONING if self._writes(answer | {key: self._mark})), None)
        self.writes_tools, self.parallel, self._call_rest, self._call_end = False, False, "", ""
        for self._as_text in (False, True):
            probe = self.probe(self._mark)
            if probe is not None and self._mark in probe:
                self.writes_tools, rest = True, probe.rpartition(self._mark)[2]
                at = max((rest.rfind(special) for special in self._specials), default=-1)
                self._call_rest, self._call_end = (rest[:at], rest[at:]) if at >= 0 else (rest, "")
                both = answer | {"content": "", "tool_calls": [_call(_NAME, "first"), _call(_NAME, self._mark)]}
                self.parallel = self._writes(both)
                break

    def probe(self, value: str) -> str | None:
        """Return the text of an answer with one call of `PROBE_TOOL`.

        Args:
            value: its argument.

        Returns:
            None if the template writes no tools.
        """
        options = {"tools": [PROBE_TOOL]}
        answer = self._marked({"role": "assistant", "content": "", "tool_calls": [_call(_NAME, value)]}, value)
        try:
            start = self._render([_QUESTION], options, whole=False)
            text = self._render([_QUESTION, answer], options, whole=True)
        except UserError:
            return None
        return text[len(_common(start, text)) :] if _NAME in start else None

    def opening(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Opening:
        """Return the text of a conversation up to the next completion.

        Args:
            options: arguments of the template: `tools` and others.

        Raises:
            UserError: the template refuses it.
        """
        text = self._render(messages, options, whole=False)
        # A render of a conversation takes 0.3 ms, and headers are the same for each of its turns.
        kind = _kind(messages, options)
        header = self._headers.get(kind)
        if header is None or not text.endswith(header):
            whole = self._render(messages, options, whole=True)
            if not text.startswith(whole):
                return Opening(text, _common(text, whole))
            if len(self._headers) >= MAX_HEADERS:
                self._headers.clear()
            header = self._headers[kind] = text[len(whole) :]
        return Opening(text, text[: len(text) - len(header)])

    def between(
        self,
        before: Opening,
        answered: Sequence[Message],
        new: Sequence[Message],
        options: Mapping[str, Any],
        last_token: int | None,
    ) -> Continuation | None:
        """Return text and tokens between a completion and the next one.

        Args:
            before: the text that the completion continues.
            answered: messages up to and including the completion.
            new: messages after it.
            last_token: token that ended the completion, not repeated if the template writes it; None if it was cut.

        Returns:
            None if the template now renders the earlier messages differently.

        Raises:
            UserError: the template refuses the conversation.
        """
        answer = answered[-1]
        now = self._render([*answered[:-1], self._marked(answer, self._mark), *new], options, whole=False)
        start = before.end_in(now)
        if start < 0 or self._mark not in now[start:]:
            return None
        reasoning = next((str(answer[key]).strip() for key in REASONING if answer.get(key)), "")
        if reasoning and reasoning not in now[start:]:
            return None
        tail = now.rpartition(self._mark)[2]
        if answer.get("tool_calls"):
            at = tail.find(self._call_end, 0 if self._call_end else len(self._call_rest))
            if at < 0 or not (self._call_end or tail.startswith(self._call_rest)):
                return None
            tail = tail[at:]
        elif "</think>" in answer["content"]:  # Reasoning that no parser took out: some templates drop it.
            reasoning = answer["content"].strip()
            if reasoning not in self._render([*answered, *new], options, whole=False)[start:]:
                return None
        header, following = self._headers.get(_kind(new, options)), None
        # Templates drop the reasoning of earlier answers, which only a render of the conversation shows.
        if header and tail.endswith(header) and not reasoning:
            following = Opening(now, now[:start], tail.removesuffix(header))
        ended = "" if last_token is None else self._tokenizer.decode([last_token])
        return Continuation(self.encode(tail[len(ended) :] if tail.startswith(ended) else tail), now, following)

    def encode(self, text: str) -> Int32:
        """Return the tokens of a rendered text, int32 [N]."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False), np.int32)

    def without_end(self, token_ids: Sequence[int]) -> list[int]:
        """Return sampled tokens without the special token that ended them."""
        ended = bool(token_ids) and token_ids[-1] in self.special_ids
        return list(token_ids[:-1] if ended else token_ids)

    def _marked(self, answer: Message, value: str) -> Message:
        """Return an answer with a value in place of its text.

        If it has calls, the value becomes the argument of the first, and the others are left out.
        """
        if not answer.get("tool_calls"):
            return answer | {"content": value}
        name = answer["tool_calls"][0]["function"]["name"]
        return answer | {"tool_calls": [{**answer["tool_calls"][0], **_call(name, value)}]}

    def _writes(self, answer: Message) -> bool:
        try:
            return self._mark in self._render([_QUESTION, answer], {}, whole=True)
        except UserError:
            return False

    def _render(self, messages: Sequence[Message], options: Mapping[str, Any], *, whole: bool) -> str:
        forms = [self._with_form(message) for message in messages]
        try:
            return render(self._tokenizer, [forms], ["an agent's messages"], whole=whole, options=[options])[0]
        except UserError:
            raise
        except Exception as error:  # templates call methods of values that clients send
            raise UserError(f"an agent's messages: the chat template refuses this conversation: {error!r}") from error

    def _with_form(self, message: Message) -> Message:
        """Return a message with its calls' arguments in the template's form.

        That is JSON text, or objects.
        """
        if not message.get("tool_calls"):
            return message
        form = _json_text if self._as_text else _json_object
        calls = [
            call | {"function": call["function"] | {"arguments": form(call["function"].get("arguments") or {})}}
            for call in message["tool_calls"]
        ]
        return message | {"tool_calls": calls}


def _kind(messages: Sequence[Message], options: Mapping[str, Any]) -> tuple[str, str]:
    """Return the kind of a conversation, which decides the header of its next completion."""
    return messages[-1]["role"], repr(options)


def _call(name: str, value: str) -> dict[str, Any]:
    return {"id": "call00000", "type": "function", "function": {"name": name, "arguments": {"value": value}}}


def _json_text(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _json_object(arguments: object) -> object:
    return arguments if isinstance(arguments, dict) else {"arguments": arguments}


def same_messages(new: Sequence[Message], old: Sequence[Message], raw: str) -> int:
    """Return how alike two conversations are: 2, 1 or 0.

    2 are equal ones, 1 those that differ only in what clients change. Clients strip and reformat texts, reorder JSON, drop
    reasoning and ids, or return a completion with its tags.

    Args:
        raw: sampled text of the last message of `old`.
    """
    if len(new) != len(old):
        return 0
    if same_json(list(new), list(old)):
        return 2
    last = len(old) - 1
    pairs = enumerate(zip(new, old, strict=True))
    return int(all(_same(one, other, raw if at == last else None) for at, (one, other) in pairs))


def same_json(one: object, other: object) -> bool:
    """Compare values of JSON, of which Python takes 1, 1.0 and true for equal."""
    # Texts of Python differ where only the order of keys does, but take a third of the time.
    return one == other and (repr(one) == repr(other) or json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))


def _same(new: Message, old: Message, raw: str | None) -> bool:
    if new["role"] != old["role"]:
        return False
    if new["role"] != "assistant":
        return new["content"].strip() == old["content"].strip() or (
            new["role"] == "tool" and _canonical(new["content"]) == _canonical(old["content"])
        )
    content = _blanks(new["content"])
    if content != _blanks(old["content"]):
        return raw is not None and content == _blanks(raw) and not new.get("tool_calls")
    said = next((str(new[key]) for key in REASONING if new.get(key)), None)
    thought = next((str(old[key]) for key in REASONING if old.get(key)), "")
    return _calls(new) == _calls(old) and (said is None or _blanks(said) == _blanks(thought))


def _calls(message: Message) -> list[tuple[object, str]]:
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return [(function["name"], _canonical(function.get("arguments"))) for function in functions]


def _common(one: str, other: str) -> str:
    return commonprefix([one, other])  # noqa: RUF071 - of characters


def _blanks(text: str) -> str:
    return " ".join(text.split())


def _canonical(value: object) -> str:
    """Return a value, or that of a JSON text, as JSON with sorted keys."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
        return json.dumps(parsed, sort_keys=True)
    except (ValueError, RecursionError):
        return str(value).strip()
