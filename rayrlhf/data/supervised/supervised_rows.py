"""Validated rows: an optional prompt with one response, or two for a pair.

Text prompts become a user turn here (unless `data.chat` is off), so that later code has two cases only: plain text, and
conversations for the chat template.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayrlhf.config.data import PreferenceDatasetSection, SupervisedDatasetSection, TuningDataSection
from rayrlhf.data.supervised.row_formats import Row, RowShape, check_columns, common_messages, used_columns
from rayrlhf.data.templates import Message, check_messages, check_turns, conversation
from rayrlhf.errors import UserError

Written = str | list[Message]
"""Plain text, or a conversation."""

EMPTY, EQUAL, NOTHING = "empty answer", "chosen equal to rejected", "nothing to learn"


class InvalidRowError(UserError):
    """A well-formed row without usable content; `data.invalid: drop` counts it under its reason."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{message}; correct it, or set data.invalid to drop to leave such rows out")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class WrittenRow:
    """A validated row as text or messages.

    Attributes:
        prompt: the part before the responses, without loss; None if everything is a target, or the prompt is implicit.
        answers: whole texts, prompt included: one for SFT, chosen and rejected for a pair.
        margin: of a pair.
        row: its number.
        place: file and row, for error messages.
        token_ids: for datasets of tokens, which have no answers.
    """

    prompt: Written | None
    answers: tuple[Written, ...]
    margin: float | None
    row: int
    place: str
    token_ids: tuple[int, ...] = ()


def write_supervised(
    row: Row, number: int, shape: RowShape, section: SupervisedDatasetSection, data: TuningDataSection
) -> WrittenRow:
    """Validate a row of an SFT dataset.

    Args:
        row: its fields.
        number: its number in error messages.
        shape: of the first row.
        section: names the columns.
        data: chat template for text prompts, and the system prompt.

    Raises:
        InvalidRowError: an empty text or response.
        UserError: another format than the first row's, a wrong type, a message out of place.
    """
    place = f"{section.path}: row {number}"
    check_columns(row, shape, used_columns(shape, section), place)
    if shape.format == "text":
        return WrittenRow(None, (_text(row, section.text_field, place),), None, number, place)
    if shape.format == "tokens":
        return WrittenRow(None, (), None, number, place, _token_ids(row, section.tokens_field, place))
    if shape.format == "messages":
        turns = _turns(row, section.messages_field, place)
        _check_answers(turns, f"{place}: {section.messages_field}")
        return WrittenRow(None, (conversation(turns, data.system_prompt),), None, number, place)
    prompt = _prompt(row, shape, section, place)
    whole = _answered(prompt, row, section.completion_field, shape, data, place)
    return WrittenRow(_opened(prompt, data), (whole,), None, number, place)


def write_pair(
    row: Row, number: int, shape: RowShape, section: PreferenceDatasetSection, data: TuningDataSection
) -> WrittenRow:
    """Validate a row of a preference dataset; see `write_supervised`.

    Raises:
        InvalidRowError: an empty response, or chosen equal to rejected.
        UserError: another format than the first row's, a wrong type, a message out of place, a margin that is not a number, or
            conversations without a common prompt.
    """
    place = f"{section.path}: row {number}"
    check_columns(row, shape, used_columns(shape, section), place)
    margin = _margin(row, shape, section, place)
    fields = (section.chosen_field, section.rejected_field)
    if row[fields[0]] == row[fields[1]]:
        raise InvalidRowError(EQUAL, f"{place}: {fields[0]} and {fields[1]} are equal, expected a better and a worse answer")
    if shape.explicit_prompt:
        prompt = _prompt(row, shape, section, place)
        whole = tuple(_answered(prompt, row, field, shape, data, place) for field in fields)
        return WrittenRow(_opened(prompt, data), whole, margin, number, place)
    if row.get(section.prompt_field) is not None and not shape.conversational:
        raise UserError(f"{place}: {section.prompt_field}: expected as in the first row, which has none")
    if not shape.conversational:
        return WrittenRow(None, tuple(_text(row, field, place) for field in fields), margin, number, place)
    chosen, rejected = (_turns(row, field, place) for field in fields)
    shared = common_messages(chosen, rejected)
    if not shared:
        raise UserError(f"{place}: {fields[0]} and {fields[1]} begin with different messages, expected a prompt in common")
    for field, turns in zip(fields, (chosen, rejected), strict=True):
        _check_answers(turns[shared:], f"{place}: {field}")
    prompt = check_messages(chosen[:shared], f"{place}: the prompt that {fields[0]} and {fields[1]} share")
    whole = (conversation(chosen, data.system_prompt), conversation(rejected, data.system_prompt))
    return WrittenRow(conversation(prompt, data.system_prompt), whole, margin, number, place)


def _prompt(row: Row, shape: RowShape, section: SupervisedDatasetSection | PreferenceDatasetSection, place: str) -> Written:
    where = f"{place}: {section.prompt_field}"
    value = row[section.prompt_field]
    if shape.conversational:
        return check_messages(_list(value, where), where)
    text = _string(value, where)
    if not text.strip():
        raise InvalidRowError("empty prompt", f"{where}: the prompt is empty")
    return text if section.template is None else section.template.replace("{prompt}", text)


def _opened(prompt: Written, data: TuningDataSection) -> Written:
    """Return the prompt as a conversation or plain text."""
    if isinstance(prompt, str) and not data.chat:
        return prompt
    return conversation(prompt, data.system_prompt)


def _answered(prompt: Written, row: Row, field: str, shape: RowShape, data: TuningDataSection, place: str) -> Written:
    """Return the prompt followed by the response in a field."""
    if shape.conversational:
        turns = _turns(row, field, place)
        _check_answers(turns, f"{place}: {field}")
        return [*conversation(prompt, data.system_prompt), *turns]
    text = _text(row, field, place)
    opened = _opened(prompt, data)
    return opened + text if isinstance(opened, str) else [*opened, {"role": "assistant", "content": text}]


def _text(row: Row, field: str, place: str) -> str:
    text = _string(row[field], f"{place}: {field}")
    if not text.strip():
        raise InvalidRowError(EMPTY, f"{place}: {field}: empty, expected text to learn from")
    return text


def _token_ids(row: Row, field: str, place: str) -> tuple[int, ...]:
    where = f"{place}: {field}"
    value = row[field]
    if not isinstance(value, list) or not all(isinstance(token, int) and not isinstance(token, bool) for token in value):
        raise UserError(f"{where}: expected a list of token ids, found {type(value).__name__}")
    if not value:
        raise InvalidRowError(EMPTY, f"{where}: empty, expected tokens to learn from")
    return tuple(value)


def _turns(row: Row, field: str, place: str) -> list[Message]:
    where = f"{place}: {field}"
    value = _list(row[field], where)
    for number, message in enumerate(value, start=1):
        if isinstance(message, dict) and message.get("tool_calls"):
            raise UserError(f"{where}: message {number}: tool_calls are not supported, expected text in content")
    return check_turns(value, where)


def _check_answers(turns: Sequence[Message], where: str) -> None:
    """Reject turns that do not end with the assistant, and empty responses."""
    if turns[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message is from the {turns[-1]['role']}, expected the assistant's")
    for number, turn in enumerate(turns, start=1):
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise InvalidRowError(EMPTY, f"{where}: message {number}: the assistant's content is empty")


def _margin(row: Row, shape: RowShape, section: PreferenceDatasetSection, place: str) -> float | None:
    where = f"{place}: {section.margin_field}"
    value = row.get(section.margin_field)
    if not shape.has_margin:
        if value is not None:
            raise UserError(f"{where}: expected as in the first row, which has none")
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: expected a finite number, found {value!r}")
    return float(value)


def _string(value: object, where: str) -> str:
    if isinstance(value, list):
        raise UserError(f"{where}: expected text as in the first row, found a list")
    if not isinstance(value, str):
        raise UserError(f"{where}: expected text, found {type(value).__name__}")
    return value


def _list(value: object, where: str) -> list[Any]:
    if isinstance(value, str):
        raise UserError(f"{where}: expected a list of {{role, content}} as in the first row, found text")
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list of {{role, content}}, found {type(value).__name__}")
    return value
