"""Validated rows: an optional prompt with one response, or two for a pair.

Text prompts become a user turn here (unless `data.chat` is off), so that later code has two cases only: plain text, and
conversations for the chat template.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrlhf.config.data import PreferenceDatasetSection, SupervisedDatasetSection, TuningDataSection, template_fields
from rayrlhf.data.messages import Message, as_conversation, is_transcript, read_transcript
from rayrlhf.data.row_columns import (
    ANSWERS,
    CONVERSATIONS,
    INPUT,
    INSTRUCTION,
    LABEL_FALSE,
    TOKEN_MASKS,
    Extras,
    label_value,
    prompt_text,
    read_extras,
    starts_with_prompt,
    with_system,
)
from rayrlhf.data.row_files import place_of
from rayrlhf.data.supervised.row_formats import (
    Row,
    RowShape,
    answer_columns,
    check_columns,
    common_messages,
    is_turns,
    used_columns,
)
from rayrlhf.data.templates import Options, check_messages, check_turns, conversation
from rayrlhf.errors import UserError

Written = str | list[Message]
"""Plain text, or a conversation."""

EMPTY, EQUAL, NOTHING = "empty answer", "chosen equal to rejected", "nothing to learn"
REPEATED = "prompt repeated in the answer"


class InvalidRowError(UserError):
    """A well-formed row without usable content; `data.invalid: drop` counts it under its reason."""

    def __init__(self, reason: str, message: str, *, drop: bool = False) -> None:
        super().__init__(f"{message}; correct it, or set data.invalid to drop to leave such rows out")
        self.reason = reason
        self.drop = drop
        """True for rows that their own columns exclude: dropped and counted in any case."""


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
        token_mask: their targets.
        options: arguments of the chat template.
        label: of a single answer (KTO).
        steps: of a response whose steps have labels, which is in no answer.
        right: their labels.
    """

    prompt: Written | None
    answers: tuple[Written, ...]
    margin: float | None
    row: int
    place: str
    token_ids: tuple[int, ...] = ()
    token_mask: tuple[bool, ...] = ()
    options: Options | None = None
    label: bool | None = None
    steps: tuple[str, ...] = ()
    right: tuple[bool, ...] = ()


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
    place = place_of(section.path, number)
    columns = used_columns(shape, section)
    check_columns(row, shape, columns, place)
    if shape.format == "tokens":
        return WrittenRow(None, (), None, number, place, *_tokens(row, section, place))
    extras = _extras(row, columns, shape, section, data, place)
    if extras.rejected:
        raise InvalidRowError(LABEL_FALSE, f"{place}: label: false, expected answers to learn from", drop=True)
    if shape.format != "prompt-completion" and section.template is not None:
        raise UserError(f"{place}: template: no effect on the format {shape.format}, expected prompts as text")
    if shape.format == "text":
        return WrittenRow(None, (_text(row, section.text_field, place),), None, number, place)
    if shape.format == "messages":
        turns = with_system(_turns(row, section.messages_field, place), extras.system, place)
        _check_answers(turns, f"{place}: {section.messages_field}")
        return WrittenRow(None, (conversation(turns, data.system_prompt),), None, number, place, options=extras.options)
    prompt = _prompt(row, shape, section, place, extras, data)
    whole = _answered(prompt, row, section, section.completion_field, shape, data, place)
    return WrittenRow(_opened(prompt, data), (whole,), None, number, place, options=extras.options)


def write_pair(
    row: Row, number: int, shape: RowShape, section: PreferenceDatasetSection, data: TuningDataSection
) -> WrittenRow:
    """Validate a row of a preference dataset; see `write_supervised`.

    Raises:
        InvalidRowError: an empty response, or chosen equal to rejected.
        UserError: another format than the first row's, a wrong type, a message out of place, a margin that is not a number, or
            conversations without a common prompt.
    """
    place = place_of(section.path, number)
    columns = used_columns(shape, section)
    check_columns(row, shape, columns, place)
    if shape.format == "unpaired":
        return _write_single(row, number, shape, section, data)
    margin = _margin(row, shape, section, place)
    fields = (section.chosen_field, section.rejected_field)
    if row[fields[0]] == row[fields[1]]:
        raise InvalidRowError(EQUAL, f"{place}: {fields[0]} and {fields[1]} are equal, expected a better and a worse answer")
    extras = _extras(row, (*columns, section.prompt_field), shape, section, data, place)
    if shape.explicit_prompt:
        prompt = _prompt(row, shape, section, place, extras, data)
        whole = tuple(_answered(prompt, row, section, field, shape, data, place) for field in fields)
        return WrittenRow(_opened(prompt, data), whole, margin, number, place, options=extras.options)
    if section.template is not None:
        raise UserError(f"{place}: template: no effect without prompts as text in {section.prompt_field}")
    if row.get(section.prompt_field) is not None and not shape.conversational:
        raise UserError(f"{place}: {section.prompt_field}: expected as in the first row, which has none")
    if not shape.conversational:
        for name in CONVERSATIONS:
            if is_turns(row.get(name)) and name not in section.ignored_fields:
                raise UserError(f"{place}: {name}: usually the prompt, and not used next to answers as text; expected messages")
        return WrittenRow(None, tuple(_text(row, field, place) for field in fields), margin, number, place)
    chosen, rejected = (_turns(row, field, place) for field in fields)
    chosen, rejected = _after_prompt(row, (chosen, rejected), section, place)
    chosen, rejected = with_system(chosen, extras.system, place), with_system(rejected, extras.system, place)
    shared = common_messages(chosen, rejected)
    if not shared:
        raise UserError(f"{place}: {fields[0]} and {fields[1]} begin with different messages, expected a prompt in common")
    for field, turns in zip(fields, (chosen, rejected), strict=True):
        _check_answers(turns[shared:], f"{place}: {field}")
    prompt = check_messages(chosen[:shared], f"{place}: the prompt that {fields[0]} and {fields[1]} share")
    whole = (conversation(chosen, data.system_prompt), conversation(rejected, data.system_prompt))
    return WrittenRow(conversation(prompt, data.system_prompt), whole, margin, number, place, options=extras.options)


def _write_single(
    row: Row, number: int, shape: RowShape, section: PreferenceDatasetSection, data: TuningDataSection
) -> WrittenRow:
    """Validate a single answer with a label; see `write_pair`."""
    place = place_of(section.path, number)
    label = label_value(row[section.label_field])
    if label is None:
        raise UserError(f"{place}: {section.label_field}: expected true or false, found {row[section.label_field]!r}")
    extras = _extras(row, used_columns(shape, section), shape, section, data, place)
    prompt = _prompt(row, shape, section, place, extras, data)
    whole = _answered(prompt, row, section, section.completion_field, shape, data, place)
    return WrittenRow(_opened(prompt, data), (whole,), None, number, place, options=extras.options, label=label)


def write_prompt(
    row: Row,
    columns: Sequence[str],
    shape: RowShape,
    section: SupervisedDatasetSection | PreferenceDatasetSection,
    data: TuningDataSection,
    place: str,
) -> tuple[Written, Options | None]:
    """Return a row's prompt, and its arguments of the chat template.

    Raises:
        InvalidRowError: an empty prompt.
        UserError: a wrong type, or a column that is not supported next to it.
    """
    extras = _extras(row, columns, shape, section, data, place)
    return _opened(_prompt(row, shape, section, place, extras, data), data), extras.options


def _extras(
    row: Row,
    columns: Sequence[str],
    shape: RowShape,
    section: SupervisedDatasetSection | PreferenceDatasetSection,
    data: TuningDataSection,
    place: str,
) -> Extras:
    used = set(columns) | set(template_fields(section.template))
    has_prompt = shape.has_prompt
    if section.prompt_field == INSTRUCTION and has_prompt:
        used.add(INPUT)
    special = answer_columns(shape)
    turns = shape.conversational or (data.chat and has_prompt)
    return read_extras(row, used, special, section.ignored_fields, place, turns=turns)


def _after_prompt(
    row: Row, pair: tuple[list[Message], list[Message]], section: PreferenceDatasetSection, place: str
) -> tuple[list[Message], list[Message]]:
    """Return conversations that contain the text prompt next to them.

    Raises:
        UserError: they have another prompt.
    """
    prompt = row.get(section.prompt_field)
    if not isinstance(prompt, str) or section.prompt_field in section.ignored_fields:
        return pair
    if all(turns[0]["role"] == "assistant" for turns in pair):
        first = {"role": "user", "content": prompt}
        return [first, *pair[0]], [first, *pair[1]]
    asked = [message["content"].strip() for turns in pair for message in turns if message["role"] == "user"]
    if prompt.strip() not in asked and not any(is_transcript(row[field]) for field in (section.chosen_field,)):
        raise UserError(
            f"{place}: {section.prompt_field}: not in the conversations next to it; remove one, or name it in ignored_fields"
        )
    return pair


def _prompt(
    row: Row,
    shape: RowShape,
    section: SupervisedDatasetSection | PreferenceDatasetSection,
    place: str,
    extras: Extras,
    data: TuningDataSection,
) -> Written:
    where = f"{place}: {section.prompt_field}"
    value = row.get(section.prompt_field)
    if shape.conversational:
        if section.template is not None:
            raise UserError(f"{where}: template: no effect on conversations, expected prompts as text")
        return with_system(check_messages(_list(value, where), where), extras.system, place)
    named = template_fields(section.template)
    text = "" if value is None and named and "prompt" not in named else _string(value, where)
    whole = prompt_text(row, text, section.prompt_field, section.template, place)
    if not (whole if "prompt" not in named and named else text).strip():
        raise InvalidRowError("empty prompt", f"{where}: the prompt is empty")
    if extras.system is not None and data.chat:
        return with_system([{"role": "user", "content": whole}], extras.system, place)
    return whole


def _opened(prompt: Written, data: TuningDataSection) -> Written:
    """Return the prompt as a conversation or plain text."""
    if isinstance(prompt, str) and not data.chat:
        return prompt
    return conversation(prompt, data.system_prompt)


def _answered(
    prompt: Written,
    row: Row,
    section: SupervisedDatasetSection | PreferenceDatasetSection,
    field: str,
    shape: RowShape,
    data: TuningDataSection,
    place: str,
) -> Written:
    """Return the prompt followed by the response in a field."""
    if shape.conversational:
        turns = _turns(row, field, place)
        _check_answers(turns, f"{place}: {field}")
        opening = conversation(prompt, data.system_prompt)
        if turns[: len(prompt)] == prompt:
            raise InvalidRowError(REPEATED, f"{place}: {field}: repeats the messages of the prompt, expected the answer alone")
        if turns[0]["role"] != "assistant":
            raise UserError(
                f"{place}: {field}: message 1 is from the {turns[0]['role']}, expected the assistant's, after the prompt"
            )
        return [*opening, *turns]
    text = _text(row, field, place)
    if starts_with_prompt(str(row.get(section.prompt_field) or ""), text):
        raise InvalidRowError(REPEATED, f"{place}: {field}: repeats the prompt, expected the answer alone")
    opened = _opened(prompt, data)
    return opened + text if isinstance(opened, str) else [*opened, {"role": "assistant", "content": text}]


def _text(row: Row, field: str, place: str) -> str:
    text = _string(row[field], f"{place}: {field}")
    if not text.strip():
        raise InvalidRowError(EMPTY, f"{place}: {field}: empty, expected text to learn from")
    return text


def _tokens(row: Row, section: SupervisedDatasetSection, place: str) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Return the tokens of a pre-tokenized row and their targets, without padding."""
    ids = _integers(row, section.tokens_field, place)
    if not ids:
        raise InvalidRowError(EMPTY, f"{place}: {section.tokens_field}: empty, expected tokens to learn from")
    mask = [True] * len(ids)
    kept = [True] * len(ids)
    for name in (*TOKEN_MASKS, "attention_mask", "position_ids"):
        if row.get(name) is None or name in section.ignored_fields:
            continue
        values, where = _integers(row, name, place), f"{place}: {name}"
        if len(values) != len(ids):
            raise UserError(f"{where}: {len(values)} values, expected {len(ids)} as in {section.tokens_field}")
        if name == "labels":
            if wrong := next((label for label, token in zip(values, ids, strict=True) if label not in (-100, token)), None):
                raise UserError(f"{where}: {wrong}, expected the token itself or -100")
            mask = [one and label != -100 for one, label in zip(mask, values, strict=True)]
        elif name == "position_ids":
            if list(values) != list(range(len(ids))):
                raise UserError(f"{where}: expected 0, 1, 2, ...; write one row per text, and let train.packing pack them")
        elif not {*values} <= {0, 1}:
            raise UserError(f"{where}: expected 0 and 1 only")
        elif name == "attention_mask":
            kept = [bool(value) for value in values]
        else:
            mask = [one and bool(value) for one, value in zip(mask, values, strict=True)]
    read_extras(row, {*TOKEN_MASKS, section.tokens_field}, ANSWERS, section.ignored_fields, place, turns=False)
    return tuple(np.array(ids)[kept].tolist()), tuple(np.array(mask)[kept].tolist())


def _integers(row: Row, field: str, place: str) -> tuple[int, ...]:
    value = row[field]
    if not isinstance(value, list) or not all(isinstance(token, int) for token in value):
        raise UserError(f"{place}: {field}: expected a list of token ids, found {type(value).__name__}")
    if field not in (*TOKEN_MASKS, "attention_mask") and any(isinstance(token, bool) for token in value):
        raise UserError(f"{place}: {field}: expected a list of token ids, found bool")
    return tuple(int(token) for token in value)


def _turns(row: Row, field: str, place: str) -> list[Message]:
    where = f"{place}: {field}"
    value = row[field]
    if is_transcript(value):
        value = read_transcript(value)
    return check_turns(_list(value, where), where)


def _check_answers(turns: Sequence[Message], where: str) -> None:
    """Reject turns that do not end with the assistant, and empty responses."""
    if turns[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last message is from the {turns[-1]['role']}, expected the assistant's")
    for number, turn in enumerate(turns, start=1):
        if turn["role"] == "assistant" and not turn["content"].strip() and not turn.get("tool_calls"):
            raise InvalidRowError(EMPTY, f"{where}: message {number}: the assistant's content is empty")
    first = next((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), 0)
    if first and turns[first - 1]["role"] == "user" and not turns[first - 1]["content"].strip():
        raise InvalidRowError("empty prompt", f"{where}: message {first}: the prompt is empty")


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
    if is_turns(value):
        raise UserError(f"{where}: expected text as in the first row, found a list")
    if not isinstance(value, str):
        raise UserError(f"{where}: expected text, found {type(value).__name__}")
    return value


def _list(value: object, where: str) -> list[Any]:
    value = as_conversation(value)
    if isinstance(value, str):
        raise UserError(f"{where}: expected a list of {{role, content}} as in the first row, found text")
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list of {{role, content}}, found {type(value).__name__}")
    return value
