"""TRL's supervised formats, inferred from the columns of the first row.

The formats are text, a conversation, a prompt with one completion, and a pair of responses to one prompt. A pair without a
prompt column has an implicit prompt: the common beginning of both. Each field is text, or a list of {role, content} messages.
All rows must have the format of the first.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rayrlhf.config.data import PreferenceDatasetSection, RewardDatasetSection, SupervisedDatasetSection, template_fields
from rayrlhf.data.messages import Message, as_conversation, ends_with_answer, is_transcript
from rayrlhf.data.row_columns import ANSWERS, LABEL, answer_key
from rayrlhf.errors import UserError

Format = Literal["text", "messages", "prompt-completion", "tokens", "preference", "unpaired", "stepwise"]
Row = Mapping[str, Any]

_SIMILAR = 0.85
"""Similarity at which an unused column counts as a typo of an optional field (`promt`, `margins`)."""


@dataclass(frozen=True, slots=True)
class RowShape:
    """Common shape of all rows of a dataset.

    Attributes:
        format: format, defined by the columns.
        conversational: fields hold messages, not text.
        explicit_prompt: pairs have a prompt column.
        has_margin: pairs have a margin column, by which the better response should win.
    """

    format: Format
    conversational: bool
    explicit_prompt: bool = True
    has_margin: bool = False

    @property
    def has_prompt(self) -> bool:
        """Rows have a prompt in a column of its own."""
        return self.format in ("prompt-completion", "unpaired", "stepwise") or (
            self.format == "preference" and self.explicit_prompt
        )


def supervised_shape(row: Row, section: SupervisedDatasetSection, place: str) -> RowShape:
    """Return the shape of an SFT dataset from its first row.

    Args:
        row: the first row.
        section: names the columns, and the format unless it is `auto`.
        place: file and row, for error messages.

    Raises:
        UserError: the columns fit no format, or several.
    """
    fields = _supervised_fields(section)
    wanted = fields if section.format == "auto" else {section.format: fields[section.format]}
    found = [name for name, columns in wanted.items() if all(_has(row, column) for column in columns)]
    if len(found) > 1 and "tokens" in found:
        found.remove("tokens")  # A dataset may store tokens of another tokenizer; the text takes precedence.
    if section.format == "auto" and "messages" in found and _is_prompt_of_pair(row, section.messages_field):
        found.remove("messages")
    if len(found) > 1:
        raise UserError(f"{place}: the columns fit more than one format; set format to one of {', '.join(found)}")
    if not found:
        raise UserError(f"{place}: {_expected(wanted.values())}, found {_columns(row)}{_hint(row, wanted.values(), section)}")
    columns = fields[found[0]]
    conversational = found[0] == "messages" or (
        found[0] == "prompt-completion" and any(is_turns(row[column]) for column in columns)
    )
    return RowShape(found[0], conversational)


def preference_shape(
    row: Row, section: PreferenceDatasetSection, place: str, *, transcripts: bool = True, labels: bool = False
) -> RowShape:
    """Return the shape of a preference dataset from its first row; see `supervised_shape`.

    `labels` also allows single answers with a label (KTO).

    Transcripts of Anthropic HH without a prompt are conversations, unless `transcripts` is False.

    A text prompt next to conversations is ignored: the conversations contain it (as in TRL's `maybe_extract_prompt`).
    """
    columns: tuple[str, ...] = (section.chosen_field, section.rejected_field)
    single = (section.prompt_field, section.completion_field, section.label_field)
    if labels and all(_has(row, column) for column in single):
        return RowShape("unpaired", is_turns(row[section.prompt_field]))
    if labels and not all(_has(row, column) for column in columns):
        raise UserError(f"{place}: {_expected([single, columns])}, found {_columns(row)}")
    if not all(_has(row, column) for column in columns):
        raise UserError(f"{place}: {_expected([columns])}, found {_columns(row)}{_hint(row, [columns], section)}")
    pair = row[section.chosen_field], row[section.rejected_field]
    conversational = is_turns(pair[0]) or (transcripts and all(map(is_transcript, pair)))
    prompt = row.get(section.prompt_field)
    for key in ("prompt_field", "margin_field"):
        if not _has(row, getattr(section, key)):
            _refuse_slip(row, getattr(section, key), key, place)
    explicit = prompt is not None and not (conversational and not is_turns(prompt))
    conversational &= not (explicit and is_transcript(pair[0]))
    return RowShape("preference", conversational, explicit, _has(row, section.margin_field))


def step_shape(row: Row, section: RewardDatasetSection, place: str) -> RowShape:
    """Return the shape of a dataset of labeled steps from its first row; see `supervised_shape`."""
    columns = (section.prompt_field, section.steps_field, section.step_labels_field)
    if not all(_has(row, column) for column in columns):
        pairs = _has(row, section.chosen_field) and _has(row, section.rejected_field)
        hint = "; these are preference pairs, for kind outcome" if pairs else "; name them with steps_field, step_labels_field"
        raise UserError(f"{place}: {_expected([columns])}, found {_columns(row)}{hint}")
    return RowShape("stepwise", is_turns(row[section.prompt_field]))


def is_turns(value: object) -> bool:
    """Return True for messages, also as JSON text."""
    return isinstance(as_conversation(value), list)


def _is_prompt_of_pair(row: Row, field: str) -> bool:
    """Return True for a conversation without an answer next to two answers as messages."""
    turns = as_conversation(row[field])
    apart = isinstance(turns, list) and not ends_with_answer(turns)
    return apart and is_turns(row.get("chosen")) and is_turns(row.get("rejected"))


def used_columns(shape: RowShape, section: SupervisedDatasetSection | PreferenceDatasetSection) -> tuple[str, ...]:
    """Return the required columns of a shape."""
    if isinstance(section, SupervisedDatasetSection):
        columns = _supervised_fields(section)[shape.format]
    elif shape.format == "unpaired":
        columns = (section.prompt_field, section.completion_field, section.label_field)
    elif isinstance(section, RewardDatasetSection) and shape.format == "stepwise":
        columns = (section.prompt_field, section.steps_field, section.step_labels_field)
    else:
        prompt = (section.prompt_field,) if shape.explicit_prompt else ()
        margin = (section.margin_field,) if shape.has_margin else ()
        columns = (*prompt, section.chosen_field, section.rejected_field, *margin)
    return columns if section.group_field is None else (*columns, section.group_field)


def answer_columns(shape: RowShape) -> set[str]:
    """Return the special columns next to answers that a shape reads.

    The label of a text or of a pair does not select its row.
    """
    return ANSWERS - {LABEL} if shape.format in ("text", "preference", "unpaired") else ANSWERS


def check_columns(row: Row, shape: RowShape, columns: Iterable[str], place: str) -> None:
    """Check that a row has the columns of the first one.

    Raises:
        UserError: a column is missing or empty.
    """
    for column in columns:
        if not _has(row, column):
            raise UserError(
                f"{place}: {column}: missing or null, expected as in the first row ({shape.format}); found {_columns(row)}"
            )


def common_messages(chosen: list[Message], rejected: list[Message]) -> int:
    """Return the number of leading messages in common, leaving at least one of each."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((index for index in range(limit) if chosen[index] != rejected[index]), limit)


def _supervised_fields(section: SupervisedDatasetSection) -> dict[Format, tuple[str, ...]]:
    return {
        "text": (section.text_field,),
        "messages": (section.messages_field,),
        "prompt-completion": (*(() if _no_prompt(section) else (section.prompt_field,)), section.completion_field),
        "tokens": (section.tokens_field,),
    }


def _no_prompt(section: SupervisedDatasetSection) -> bool:
    """Return True if the template has no place for the prompt column."""
    return section.template is not None and "prompt" not in template_fields(section.template)


def _has(row: Row, column: str) -> bool:
    # Parquet and `datasets` fill in null where a row lacks a column.
    return row.get(column) is not None


def _expected(formats: Iterable[tuple[str, ...]]) -> str:
    return f"expected the columns {', or '.join(' and '.join(columns) for columns in formats)}"


def _columns(row: Row) -> str:
    return ", ".join(str(column) for column in row if row[column] is not None) or "none"


def _hint(row: Row, formats: Iterable[tuple[str, ...]], section: SupervisedDatasetSection | PreferenceDatasetSection) -> str:
    """Return a hint for columns that fit no format."""
    if isinstance(section, SupervisedDatasetSection):
        if _has(row, "chosen") and _has(row, "rejected"):
            settings = answer_key(row, section.prompt_field)
            return f"; these are preference pairs, of which SFT learns the better answer with {settings}"
        if set(row) == {section.prompt_field}:
            return "; these are prompts alone, for PPO and not for SFT"
    elif _has(row, "completions") and _has(row, "labels"):
        return "; these are steps with labels, for a reward model of kind process"
    elif _has(row, "completion"):
        return "; these are completions without a rejected one, for SFT and not for a reward model"
    for column in (column for columns in formats for column in columns if not _has(row, column)):
        if near := difflib.get_close_matches(column, [str(name) for name in row], n=1, cutoff=_SIMILAR):
            return f"; is {near[0]} meant to be {column}?"
    names = "text_field, messages_field, prompt_field, completion_field, tokens_field"
    return f"; name them with {names if isinstance(section, SupervisedDatasetSection) else 'chosen_field, rejected_field'}"


def _refuse_slip(row: Row, field: str, key: str, place: str) -> None:
    """Reject a probable typo of an optional field, which would otherwise be ignored silently."""
    if near := difflib.get_close_matches(field, [str(name) for name in row if _has(row, name)], n=1, cutoff=_SIMILAR):
        raise UserError(f"{place}: unknown column {near[0]}; did you mean {field}? (or set {key} to {near[0]})")
