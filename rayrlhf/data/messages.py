"""Conversion of datasets' messages to {role, content} and keys for chat templates.

ShareGPT's `from` and `value`, contents in text parts, conversations as JSON text or as transcripts of Anthropic HH, the older
`function_call`, and loss flags (`weight`, `train`, ...) are converted. All other keys are kept for the chat template.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rayrlhf.errors import UserError

Message = dict[str, Any]
"""`role` and `content` are texts; `train` is False for an assistant's turn without loss; other keys are the template's."""
ROLES = ("system", "user", "assistant", "tool")
ALIASES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Other names of the roles, of OpenAI and ShareGPT."""
LOSS_KEYS = ("weight", "train", "training", "loss")
"""Keys of a message that exclude it from the loss: 0 or false."""
REFUSED_KEYS = ("images", "image", "audio", "audios", "video", "videos", "train_detail", "training_detail", "loss_mask")
_PLAIN = {"role", "content"}
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):[ ]?")


def standard_message(message: object, where: str) -> Message:
    """Return a message as {role, content} and keys for chat templates.

    Args:
        message: the dataset's.
        where: file, row, field and number of the message, for error messages.

    Raises:
        UserError: no role or content, an unknown role, content that is not text, or a key with an unsupported value.
    """
    if isinstance(message, dict) and message.keys() == _PLAIN:
        role, content = message["role"], message["content"]
        if isinstance(content, str) and role in ROLES:
            return {"role": role, "content": content}
    if not isinstance(message, dict):
        raise UserError(f"{where}: expected {{role, content}}, found {short(message)}")
    fields = {str(key): value for key, value in message.items() if value is not None}
    if "from" in fields and "value" in fields and "role" not in fields:
        fields["role"], fields["content"] = fields.pop("from"), fields.pop("value")
        if fields["role"] in ("function_call", "tool_call"):
            fields["role"], fields["function_call"] = "assistant", _parsed_call(fields["content"], where)
            fields["content"] = ""
    for key in REFUSED_KEYS:
        if fields.get(key) not in (None, [], "", {}):
            raise UserError(f"{where}: {key}: not supported, expected text without it")
        fields.pop(key, None)
    _convert_calls(fields, where)
    if "content" not in fields and "tool_calls" in fields:
        fields["content"] = ""
    if not fields.keys() >= _PLAIN and not message.keys() >= _PLAIN:
        raise UserError(f"{where}: expected {{role, content}}, found {short(message)}")
    content = _joined(fields.get("content"), where)
    role = fields.get("role")
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(f"{where}: expected text in role and content, found {short(message)}")
    role = ALIASES.get(role, role)
    if role not in ROLES:
        near = difflib.get_close_matches(role, ROLES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(ROLES)}"
        raise UserError(f"{where}: unknown role {role!r}; {hint}")
    flag = _loss_flag(fields, role, where)
    others = {key: value for key, value in fields.items() if key not in _PLAIN}
    return {"role": role, "content": content, **others} | ({} if flag else {"train": False})


def as_conversation(value: object) -> object:
    """Return messages in a JSON text, or a single message, as a list.

    Any other value is returned unchanged.
    """
    if isinstance(value, dict) and _is_messages([value]):
        return [value]
    if not isinstance(value, str):
        return value
    if value.startswith("[") and ('"role"' in value or '"from"' in value):
        try:
            parsed = json.loads(value)
        except ValueError:
            return value
        return parsed if _is_messages(parsed) else value
    return value


def ends_with_answer(messages: Sequence[object]) -> bool:
    """Return True for a prompt with the assistant's answer behind it."""
    last = messages[-1] if len(messages) > 1 else None
    role = last.get("role", last.get("from")) if isinstance(last, dict) else None
    return isinstance(role, str) and ALIASES.get(role, role) == "assistant"


def is_transcript(value: object) -> bool:
    """Return True for a text of Anthropic HH, with turns of Human and Assistant."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def read_transcript(text: str) -> list[Message]:
    """Return the turns of an Anthropic HH transcript."""
    _, *parts = _TRANSCRIPT.split("\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": words.strip()} for role, words in zip(parts[::2], parts[1::2], strict=True)]


def before_last_answer(text: str) -> str:
    """Return an Anthropic HH transcript up to the place of its last answer."""
    return text[: text.rindex("\n\nAssistant:")] + "\n\nAssistant:"


def loss_free(messages: Iterable[Mapping[str, Any]]) -> bool:
    """Return True if a turn is excluded from the loss."""
    return any(message.get("train") is False for message in messages)


def extra_keys(messages: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the keys of messages that only some chat templates write."""
    found: set[str] = set()
    for message in messages:
        if len(message) > 2:
            found |= message.keys() - _PLAIN - {"train"}
    return found


def _is_messages(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and (one.keys() >= _PLAIN or {"from", "value"} <= one.keys()) for one in value)
    )


def _joined(content: object, where: str) -> object:
    """Return text parts as one text."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if isinstance(part, dict) and part.get("type", "text") not in ("text", "input_text", "output_text"):
            raise UserError(f"{where}: a part of type {part['type']}: not supported, expected parts of text")
        if not isinstance(text, str):
            raise UserError(f"{where}: expected parts {{type: text, text}}, found {short(part)}")
        texts.append(text)
    return "".join(texts)


def _convert_calls(fields: dict[str, Any], where: str) -> None:
    """Replace `function_call` by `tool_calls`, and JSON text in arguments by the object."""
    if call := fields.pop("function_call", None):
        if fields.get("tool_calls"):
            raise UserError(f"{where}: expected function_call or tool_calls, found both")
        fields["tool_calls"] = [{"type": "function", "function": call}]
    calls = fields.get("tool_calls")
    if not calls:
        fields.pop("tool_calls", None)
        return
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: tool_calls: expected a list of calls, found {short(calls)}")
    if fields.get("role") != "assistant" and ALIASES.get(str(fields.get("role"))) != "assistant":
        raise UserError(f"{where}: tool_calls: expected in the assistant's messages only")
    fields["tool_calls"] = [_standard_call(call, f"{where}: tool_calls") for call in calls]


def _standard_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: expected {{name, arguments}}, found {short(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    standard = {**function, "arguments": arguments}
    return {**call, "function": standard} if "function" in call else {"type": "function", "function": standard}


def _parsed_call(value: object, where: str) -> dict[str, Any]:
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        call = None
    if not isinstance(call, dict):
        raise UserError(f"{where}: expected a call as JSON {{name, arguments}}, found {short(value)}")
    return call


def _loss_flag(fields: dict[str, Any], role: str, where: str) -> bool:
    """Return False if a loss key excludes the message, and remove the keys."""
    flags = set()
    for key in LOSS_KEYS:
        if key in fields:
            value = fields.pop(key)
            if value not in (0, 1):
                raise UserError(f"{where}: {key}: expected 0, 1, true or false, found {short(value)}")
            if value and role != "assistant":
                raise UserError(f"{where}: {key}: the loss is on the assistant's turns only, expected 0 for the {role}")
            flags.add(bool(value))
    if len(flags) > 1:
        raise UserError(f"{where}: {', '.join(LOSS_KEYS)} contradict one another")
    return flags != {False} or role != "assistant"


def short(value: object) -> str:
    """Return the beginning of a value's representation."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
