"""Formats by their columns, and columns that change text or loss.

Every reader goes through `recognized` (columns of the dataset's first row) and `read_extras` (each row). A column is used,
named as unused in the plan, or refused.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rayrlhf.config.data import TEMPLATE_FIELD, template_fields
from rayrlhf.config.section import Section
from rayrlhf.data.messages import Message, as_conversation, ends_with_answer, is_transcript, short
from rayrlhf.data.templates import Options
from rayrlhf.data.words import words_of
from rayrlhf.errors import UserError

Row = Mapping[str, Any]
SectionType = TypeVar("SectionType", bound=Section)

SYSTEM = ("system", "system_prompt")
TEMPLATE_ARGUMENTS = ("tools", "chat_template_kwargs")
NO_TEXT = ("history", "functions", "documents", "images", "image", "videos", "video", "audio", "audios")
"""Columns that belong to the prompt and are not supported."""
LOSS = ("labels", "completion_mask", "assistant_masks", "loss_mask", "weight", "loss_weight", "sample_weight")
"""Columns that define the loss of tokens or rows."""
TOKEN_MASKS = ("labels", "completion_mask", "assistant_masks", "loss_mask")
"""Columns that define the loss of pre-tokenized rows."""
LABEL, INPUT, INSTRUCTION = "label", "input", "instruction"
PROMPTS = {*SYSTEM, *TEMPLATE_ARGUMENTS, *NO_TEXT}
ANSWERS = {*PROMPTS, *LOSS, LABEL, INPUT}
QUESTIONS = ("question", INSTRUCTION, "query", INPUT)
"""Columns with the prompt of a pair, in order of precedence."""
CONVERSATIONS = ("conversations", "messages")
"""Columns with a conversation, in order of precedence."""
LABEL_FALSE = "label is false"
LAST_ANSWER = "last answer"
"""End of the names of formats whose prompt is a conversation up to its last answer."""
_LABELS: dict[object, bool] = {"true": True, "false": False}
"""Labels as text, as in CSV files, in lower case."""


@dataclass(frozen=True, slots=True)
class Extras:
    """Parts of a row next to its prompt and answers.

    Attributes:
        system: its system message.
        options: its arguments of the chat template.
        rejected: a KTO row whose answer is labeled false.
    """

    system: str | None = None
    options: Options | None = None
    rejected: bool = False


NONE = Extras()


def recognized(row: Row, section: SectionType, purpose: str) -> tuple[SectionType, str]:
    """Return a section with its format's columns, and the format's name.

    Columns that the section names and the row has take precedence.

    Args:
        row: the first row.
        section: names the columns.
        purpose: `samples`, `pairs`, `prompts` or `examples` (a prompt with one answer).
    """
    names = section.model_dump(include={key for key in type(section).model_fields if key.endswith("_field")})
    answer = {"samples": "completion_field", "examples": "response_field"}.get(purpose)
    conversations = next((name for name in CONVERSATIONS if _is_turns(row.get(name))), None)
    default = type(section).model_fields["prompt_field"].default
    free = names["prompt_field"] == default and row.get(default) is None
    if purpose == "pairs":
        chosen, rejected = (row.get(names[key]) for key in ("chosen_field", "rejected_field"))
        if is_transcript(chosen) and is_transcript(rejected):
            return section, "Anthropic HH transcripts"
        if free and not (_is_turns(chosen) and _is_turns(rejected) and not any(map(row.get, QUESTIONS))):
            prompt = next((name for name in QUESTIONS if isinstance(row.get(name), str) and row[name]), None)
            if prompt is not None:
                return section.model_copy(update={"prompt_field": prompt}), f"pairs with {prompt}"
        if free and conversations and _is_message(chosen) and _is_message(rejected):
            return section.model_copy(update={"prompt_field": conversations}), f"pairs with {conversations}"
        return section, "pairs of conversations" if _is_turns(chosen) else "pairs"
    value = as_conversation(row.get(names["prompt_field"]))
    answered = is_transcript(value) or (isinstance(value, list) and ends_with_answer(value))
    if purpose == "prompts" and names["prompt_field"] != default and answered:
        return section, f"{names['prompt_field']} without its {LAST_ANSWER}"
    if purpose == "samples":
        if is_transcript(row.get(names["messages_field"])):
            return section, "Anthropic HH transcripts"
        if conversations is not None and names["prompt_field"] == conversations:
            return section, f"{conversations} with answers"
        if row.get(names["messages_field"]) is None and conversations == "conversations":
            return section.model_copy(update={"messages_field": conversations}), "ShareGPT conversations"
        if row.get(names["messages_field"]) is not None:
            kept = ", of which those with label true are kept" if is_label(row.get(LABEL)) else ""
            return section, f"conversations{kept}"
    alpaca = row.get(INSTRUCTION) is not None and (answer is None or "output" in row)
    if free and alpaca:
        columns = {"prompt_field": INSTRUCTION} | ({answer: "output"} if answer and names[answer] not in row else {})
        return section.model_copy(update=columns), "Alpaca instructions"
    if purpose == "samples":
        if row.get(names["text_field"]) is not None and row.get(names["prompt_field"]) is None:
            return section, "texts"
        if row.get(names["tokens_field"]) is not None and row.get(names["prompt_field"]) is None:
            return section, "tokens"
    if free and conversations and purpose != "samples":
        return section.model_copy(update={"prompt_field": conversations}), f"{conversations} without their {LAST_ANSWER}"
    if is_label(row.get(LABEL)) and answer:
        return section, "KTO answers, of which those with label true are kept"
    if INPUT in row and names["prompt_field"] == INSTRUCTION:
        return section, "Alpaca instructions"
    return section, "prompts" if answer is None else "prompts with answers"


def answer_key(row: Row, prompt_field: str) -> str:
    """Return the settings by which SFT learns the better answer of a pair."""
    chosen = as_conversation(row["chosen"])
    if is_transcript(chosen) or (isinstance(chosen, list) and len(chosen) > 1):
        return "messages_field=chosen"
    turns = CONVERSATIONS if isinstance(chosen, list) else ()
    prompt = next((name for name in (prompt_field, *QUESTIONS, *turns) if row.get(name) is not None), None)
    if prompt is None:
        return "text_field=chosen"
    return f"{f'prompt_field={prompt} and ' if prompt != prompt_field else ''}completion_field=chosen"


def _is_turns(value: object) -> bool:
    return isinstance(as_conversation(value), list)


def _is_message(value: object) -> bool:
    turns = as_conversation(value)
    return isinstance(turns, list) and len(turns) == 1


def read_extras(
    row: Row, columns: Iterable[str], special: set[str], ignored: Iterable[str], place: str, *, turns: bool
) -> Extras:
    """Return a row's parts next to its prompt and answers.

    Args:
        row: its fields.
        columns: used otherwise.
        special: `PROMPTS` or `ANSWERS`.
        ignored: left out on purpose.
        place: file and row, for error messages.
        turns: False for plain text, which has no system message and no tools.

    Raises:
        UserError: a column that changes text or loss and is not supported here.
    """
    found = [name for name in row.keys() & special if row[name] is not None and row[name] != "" and row[name] != []]
    if not found:
        return NONE
    found = sorted(set(found) - {*columns, *ignored})
    system: str | None = None
    options: dict[str, Any] = {}
    rejected = False
    for name in found:
        where, value = f"{place}: {name}", row[name]
        if name == "documents" and not (isinstance(value, list) and any(isinstance(one, dict) for one in value)):
            continue  # Counts or texts of a packed row, not a template's documents.
        if name in SYSTEM and isinstance(value, str) and turns and system is None:
            system = value
        elif name in TEMPLATE_ARGUMENTS and turns:
            options |= _options(name, value, where)
        elif name == LABEL and is_label(value):
            rejected = value is False or _LABELS.get(str(value).lower()) is False
        elif name in LOSS and (isinstance(value, str) or value in (1, True)):
            continue  # An answer in words, or the weight that a row has anyway.
        elif not (name in TEMPLATE_ARGUMENTS and not value):
            raise UserError(f"{where}: {_reason(name, turns=turns)}; or name it in ignored_fields")
    return Extras(system, options or None, rejected)


def label_value(value: object) -> bool | None:
    """Return a label, also as text; None for anything else."""
    return value if isinstance(value, bool) else _LABELS.get(str(value).lower())


def is_label(value: object) -> bool:
    """Return True for a label that selects rows, true or false, also as text."""
    return isinstance(value, bool) or (isinstance(value, str) and value.lower() in _LABELS)


def _reason(name: str, *, turns: bool) -> str:
    if name in NO_TEXT:
        return "not supported, expected rows without it"
    if name == INPUT:
        return "usually a part of the prompt, and not used; put {input} into template"
    if name == LABEL:
        return "0 or 1, a score or a class, expected true or false, by which a row is kept"
    if name in LOSS:
        return "defines the loss, and is not used with these columns"
    if not turns:
        return "not supported with plain text, expected conversations or data.chat true"
    return "expected one text as the system message"


def _options(name: str, value: object, where: str) -> Options:
    value = _parsed(value)
    if name == "tools":
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise UserError(f"{where}: expected a list of tools as JSON objects, found {short(value)}")
        return {"tools": _without_nulls(value)} if value else {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object, found {short(value)}")
    return {key: inner for key, inner in value.items() if inner is not None}


def _parsed(value: object) -> object:
    if not isinstance(value, str):
        return value
    import json

    try:
        return json.loads(value)
    except ValueError:
        return value


def _without_nulls(value: object) -> Any:
    """Remove the nulls that Parquet fills in for missing keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def prompt_text(row: Row, text: str, prompt_field: str, template: str | None, place: str) -> str:
    """Return a row's prompt in its template, or with its Alpaca input.

    Raises:
        UserError: the template names a column that the row lacks, or one without text.
    """
    if template is None:
        more = row.get(INPUT) if prompt_field == INSTRUCTION else None
        if more is not None and not isinstance(more, str):
            raise UserError(f"{place}: {INPUT}: expected text, found {type(more).__name__}")
        return f"{text}\n\n{more}" if more and more.strip() else text

    def written(match: Any) -> str:
        literal, name = match.groups()
        if literal is not None:
            return f"{{{literal}}}"
        if name == "prompt":
            return text
        if name not in row:
            known = ", ".join(map(str, row))
            raise UserError(f"{place}: template: no column {name}, only {known}; write {{{{{name}}}}} for the text itself")
        value = row[name]
        if isinstance(value, dict | list):
            raise UserError(f"{place}: {name}: expected text for the template, found {type(value).__name__}")
        return "" if value is None else str(value)

    return TEMPLATE_FIELD.sub(written, template)


def used_extras(row_columns: Iterable[str], section: Any, special: set[str], *, prompts: bool = True) -> set[str]:
    """Return the special columns and those of the template that a dataset uses.

    Args:
        row_columns: of the dataset.
        section: names the columns.
        special: `PROMPTS` or `ANSWERS`.
        prompts: False for rows without a prompt as text, which have no Alpaca input.
    """
    used = set(template_fields(section.template if "template" in type(section).model_fields else None)) - {"prompt"}
    honored = {*SYSTEM, *TEMPLATE_ARGUMENTS, LABEL} & special
    if section.prompt_field == INSTRUCTION and prompts:
        honored |= {INPUT}
    return (used | honored) & set(row_columns) - set(section.ignored_fields)


def starts_with_prompt(prompt: str, answer: str) -> bool:
    """Return True if an answer begins with its prompt of three words or more."""
    prompt = prompt.strip()
    return answer.lstrip().startswith(prompt) and len(words_of(prompt)) >= 3


def with_system(turns: list[Message], system: str | None, place: str) -> list[Message]:
    """Return turns with the system message of the row's own column, if it has one.

    Raises:
        UserError: the conversation has another one.
    """
    if system is None or not system.strip():
        return turns
    if turns[0]["role"] == "system":
        if turns[0]["content"].strip() != system.strip():
            raise UserError(f"{place}: two system messages, in the conversation and in its own column; remove one")
        return turns
    return [{"role": "system", "content": system}, *turns]


def unmet_need(row: Mapping[str, Any], needs: Mapping[str, str]) -> str:
    """Return in words which needed column a row lacks; "" if none.

    Args:
        row: of a dataset.
        needs: columns, and the setting that needs each.
    """
    return next((f"{name} needs column {column!r}" for column, name in needs.items() if column not in row), "")
