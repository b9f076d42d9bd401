"""Checks of request fields that the dialects of the endpoint share."""

import json
import logging
import math
import threading
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from rayrlhf.data.messages import REFUSED_KEYS, Message
from rayrlhf.data.templates import REASONING, check_turns
from rayrlhf.environments.endpoint.call import Refusal, invalid
from rayrlhf.errors import UserError

_logger = logging.getLogger(__name__)

SAMPLING = frozenset(
    ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "length_penalty")
)
"""Sampling settings of a request; those of the run apply."""
REFUSED = {
    "functions": "expected tools",
    "function_call": "expected tool_choice",
    "logit_bias": "it would sample from another distribution than the policy's",
    "min_tokens": "it would sample from another distribution than the policy's",
    "ignore_eos": "it would sample from another distribution than the policy's",
    "bad_words": "it would sample from another distribution than the policy's",
    "allowed_token_ids": "it would sample from another distribution than the policy's",
    "logits_processors": "it would sample from another distribution than the policy's",
    "use_beam_search": "it would sample from another distribution than the policy's",
    "guided_json": "expected response_format",
    "guided_regex": "expected response_format",
    "guided_choice": "expected response_format",
    "guided_grammar": "expected response_format",
    "structured_outputs": "expected response_format",
    "stop_token_ids": "expected stop strings in stop",
    "top_logprobs": "only the log-prob of the sampled token is known, expected 0",
    "prompt_logprobs": "only log-probs of sampled tokens are known",
    "best_of": "expected n",
    "echo": "not supported",
    "chat_template": "expected model.chat_template of the run",
    "continue_final_message": "a completion cannot be continued",
    "audio": "expected text",
    "prediction": "not supported",
    "web_search_options": "not supported",
    "documents": "not supported",
}
"""Fields that would change what is sampled or returned, with the reason of their refusal."""
MAX_COUNT = 64
"""Maximum completions of a request."""
MAX_STOPS = 16
"""Maximum stop strings of a request."""
MAX_NOTICES = 50
"""Maximum fields without effect that the log names."""
TOOL_FIELDS = {"description": (str, "text"), "parameters": (dict, "a JSON schema"), "strict": (bool, "true or false")}
"""Optional fields of a tool: their type, and its name in messages."""
REFUSED_PARTS = {"function_call": "tool_calls", "refusal": "it as text in content"} | dict.fromkeys(REFUSED_KEYS, "text")
"""Keys of a message that would change the conversation, with what is expected in their place."""
_KEPT = ("role", "content", "name", "tool_calls", "tool_call_id", *REASONING)
_noticed: set[str] = set()
_lock = threading.Lock()


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite)


def parse_fields(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a request.

    Raises:
        Refusal: it is none, or a text in it is no valid Unicode.
    """
    try:
        fields = _DECODER.decode(body.decode())
        if b"\\u" in body:
            json.dumps(fields, ensure_ascii=False).encode()  # a lone surrogate raises a ValueError
    except (ValueError, RecursionError) as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, "invalid_json", f"expected a JSON object in UTF-8: {error}") from error
    if not isinstance(fields, dict):
        raise Refusal(HTTPStatus.BAD_REQUEST, "invalid_json", f"expected a JSON object, found {type(fields).__name__}")
    return fields


def check_known(fields: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse fields that would change the result.

    Others without effect are noted, once each.

    Raises:
        Refusal: a field of `REFUSED` has a value.
    """
    for name, value in fields.items():
        if name in known:
            continue
        if name not in REFUSED:
            note(name, value)
        elif value:
            raise invalid(name, f"{name} is not supported by the policy in training: {REFUSED[name]}")


def note(name: str, value: object) -> None:
    """Log once that a field has no effect, unless its value is empty."""
    if value is None or value in ("", [], {}):
        return
    with _lock:
        new = name not in _noticed and len(_noticed) < MAX_NOTICES
        _noticed.update([name] if new else [])
    if new:
        why = "the run sets it" if name in SAMPLING else "not supported"
        _logger.warning("an agent's request has the field %r, which has no effect (%s)", name[:100], why)


def conversation_of(messages: object) -> list[Message]:
    """Return messages of OpenAI's form, checked.

    Raises:
        Refusal: they are no conversation that ends before an answer.
    """
    if not isinstance(messages, list):
        raise invalid("messages", "expected a list of messages")
    try:
        turns = check_turns([_plain(message) for message in messages], "messages")
    except UserError as error:
        raise invalid("messages", str(error)) from error
    if turns[-1]["role"] == "assistant":
        raise invalid("messages", "the last message is the assistant's; a completion cannot be continued")
    return turns


def _plain(message: object) -> Any:
    """Return the keys of a message that chat templates read.

    Others are refused or noted. A value that is not a message is left to the check.
    """
    if not isinstance(message, dict):
        return message
    for key, value in message.items():
        if key in REFUSED_PARTS and value:
            raise invalid("messages", f"{key} is not supported in a message, expected {REFUSED_PARTS[key]}")
        if key not in (*_KEPT, *REFUSED_PARTS):
            note(f"messages.{key}", value)
    plain = {key: message[key] for key in _KEPT if message.get(key) is not None}
    if message.get("role") == "assistant":
        plain.setdefault("content", "")
    else:
        plain.setdefault("content", message.get("content"))
    return plain


def tools_of(tools: object) -> list[dict[str, Any]]:
    """Return tools of OpenAI's form, checked.

    Raises:
        Refusal: one is no function with a name, one of its fields has another type, or two have the same name.
    """
    if tools in (None, []):
        return []
    if not isinstance(tools, list):
        raise invalid("tools", f"expected a list of tools, found {type(tools).__name__}")
    names: set[str] = set()
    for number, tool in enumerate(tools, start=1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") != "function":
            raise invalid("tools", f"tool {number}: expected {{type: function, function: {{name, ...}}}}")
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise invalid("tools", f"tool {number}: expected a name")
        for key, (kind, wanted) in TOOL_FIELDS.items():
            if not isinstance(value := function.get(key), kind | None):
                raise invalid("tools", f"tool {number}: {key}: expected {wanted}, found {type(value).__name__}")
        if name in names:
            raise invalid("tools", f"tool {number}: a second tool with the name {name!r}")
        names.add(name)
    return tools


class Choice(NamedTuple):
    """Use of tools: see `Call.use_tools` and `Call.forced`."""

    use_tools: bool
    forced: str | None


def choice_of(choice: object, tools: Sequence[Mapping[str, Any]]) -> Choice:
    """Return the choice of tools.

    Args:
        choice: `auto`, `none`, `required` (Anthropic: `any`), or an object with the name of a function.
        tools: as `tools_of` returns them.

    Raises:
        Refusal: it is none of these, or nothing can be called.
    """
    if choice in (None, "auto", "none"):
        return Choice(choice != "none", None)
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else "" if choice in ("required", "any") else None
    known = [tool["function"]["name"] for tool in tools]
    if not isinstance(name, str) or (isinstance(choice, dict) and choice.get("type") not in ("function", "tool")):
        raise invalid("tool_choice", f"tool_choice: expected auto, none, required or a function, found {choice!r:.80}")
    if not known or (isinstance(choice, dict) and name not in known):
        raise invalid("tool_choice", f"tool_choice {choice!r:.80}: tools has no such function; its names: {known!r:.200}")
    return Choice(True, name)


def form_of(form: object, name: str) -> Mapping[str, Any] | None:
    """Return the JSON schema of a requested text; None for any text.

    Args:
        form: {type: text}, {type: json_object} or {type: json_schema, schema}; OpenAI's chat has the schema in `json_schema`.
        name: field of the request.

    Raises:
        Refusal: it is none of these.
    """
    kind = form.get("type") if isinstance(form, dict) else form
    if kind in (None, "text"):
        return None
    if isinstance(form, dict) and kind == "json_object":
        return {"type": "object"}
    holder = form.get("json_schema", form) if isinstance(form, dict) and kind == "json_schema" else None
    schema = holder.get("schema") if isinstance(holder, dict) else None
    if not isinstance(schema, dict):
        raise invalid(name, f"{name}: expected text, json_object, or json_schema with an object in schema, found {form!r:.80}")
    return schema


def count_of(value: object, name: str, most: int | None = None) -> int | None:
    """Return a whole number from 1 on; None for none.

    Raises:
        Refusal: it is none, or above `most`.
    """
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most and value > most):
        wanted = f"from 1 to {most}" if most else "from 1 on"
        raise invalid(name, f"{name}: expected a whole number {wanted}, found {value!r:.80}")
    return value


def flag_of(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return a flag.

    Raises:
        Refusal: it is no boolean.
    """
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise invalid(name, f"{name}: expected true or false, found {value!r:.80}")
    return value


def seed_of(value: object) -> int | None:
    """Return a seed.

    Raises:
        Refusal: it is no whole number.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise invalid("seed", f"seed: expected a whole number, found {value!r:.80}")


def path_of(metadata: object) -> str:
    """Return the path in a request's metadata; empty without one.

    Raises:
        Refusal: the metadata is no object, or the path no text.
    """
    path = metadata.get("path") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict | None) or not isinstance(path, str | None):
        raise invalid("metadata", f"metadata: expected an object with text in path, found {metadata!r:.80}")
    return path or ""


def stops_of(value: object, name: str = "stop") -> tuple[str, ...]:
    """Return stop strings.

    Raises:
        Refusal: one is empty or no text, or there are too many.
    """
    words = value if isinstance(value, list) else [] if value is None else [value]
    if len(words) > MAX_STOPS or not all(isinstance(word, str) and word for word in words):
        raise invalid(name, f"{name}: expected up to {MAX_STOPS} texts that are not empty")
    return tuple(words)


def template_of(value: object) -> dict[str, Any]:
    """Return arguments of the chat template.

    Raises:
        Refusal: they are no object, or would replace the endpoint's own.
    """
    if value is None:
        return {}
    own = {"tools", "messages", "add_generation_prompt", "tokenize", "chat_template", "continue_final_message"}
    if not isinstance(value, dict) or own & value.keys():
        raise invalid("chat_template_kwargs", f"expected an object without {', '.join(sorted(own))}")
    return value
