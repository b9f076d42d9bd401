"""Data ingestion: every row is read, checked and numbered before anything is generated.

Bad data is found before it costs GPU time. Usable rows become part files, the others go to a `rejected` table with the reason.
Which rows are usable depends only on the data and the model's context. One part is in memory at a time.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any

from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.batch_inference.source import SourceRow, rejected_schema, replace_surrogates, row_schema, stream_rows
from rayrlhf.batch_inference.stored_prompts import encode_prompts
from rayrlhf.config.batch_inference import PairsSection
from rayrlhf.config.data import DatasetSection
from rayrlhf.data.dataset_rows import data_files
from rayrlhf.data.messages import as_conversation, ends_with_answer, extra_keys, is_transcript, read_transcript
from rayrlhf.data.row_columns import (
    ANSWERS,
    INPUT,
    INSTRUCTION,
    LABEL_FALSE,
    Extras,
    prompt_text,
    read_extras,
    recognized,
    starts_with_prompt,
    unmet_need,
    used_extras,
    with_system,
)
from rayrlhf.data.templates import check_messages, check_turns
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer

GIVEN = "given_response"
"""Key in a row's `columns` of a response that the dataset provides."""
CONTENT_KEYS = {"tool_calls", "reasoning_content", "thinking"}
"""Keys of a message that hold a part of its text."""
MAX_CONTENT = 2000
"""Characters of a rejected row that are stored for inspection."""
REJECTED_PER_PART = 10_000

Row = dict[str, Any]


class RejectedError(Exception):
    """A row is unusable; the message is the reason."""


def ingest_dataset(
    section: PairsSection,
    rows: PartFolder,
    rejected: PartFolder,
    *,
    rows_per_part: int,
    tokenizer: Tokenizer | None,
    longest: int | None,
    given_field: str | None = None,
    answered: bool = True,
    needs: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Read a dataset into part files, unless they are complete.

    Args:
        tokenizer: of the model; None leaves lengths unchecked.
        longest: maximum tokens of prompt, response and end of sequence; None leaves lengths unchecked.
        given_field: a field with a model's response, stored under `GIVEN`.
        answered: True requires a response in each row; False stores "" where a row has none.
        needs: columns that every row must have, and the setting that needs each.

    Raises:
        UserError: no such dataset; too many unusable rows, or no usable one; the dataset changed since an earlier start.
    """
    fingerprint = _fingerprint(section)
    if rows.sealed:
        if rows.facts()["fingerprint"] != fingerprint:
            raise UserError(f"{section.path}: changed since this run read it; choose another run.name")
        return
    for folder in (rows, rejected):
        for file in folder.files():
            file.unlink()
    reasons: Counter[str] = Counter()
    bad: list[Row] = []
    total = count = index = bad_index = 0
    checked = _checked(section, given_field, answered, needs)
    while batch := list(islice(checked, rows_per_part)):
        total += len(batch)
        good = [row for row in batch if "reason" not in row]
        if tokenizer is not None and good:
            _measure(section, good, tokenizer, longest)
        for row in batch:
            if "reason" in row:
                reasons[row["reason"]] += 1
                bad.append(_rejected_row(row))
        # A part holds the usable ones of `rows_per_part` rows. Numbers have no gaps across parts.
        good = [row for row in good if "reason" not in row]
        if good:
            count = _write_rows(rows, index, good, count)
            index += 1
        if len(bad) >= REJECTED_PER_PART:
            bad_index = _write_rejected(rejected, bad_index, bad)
    if bad:
        _write_rejected(rejected, bad_index, bad)
    _check_share(section, reasons, total, count, next(rejected.rows(), None), f"; all of them are in {rejected.path}")
    facts = {"rows": count, "read": total, "rejected": dict(reasons), "fingerprint": fingerprint}
    rows.seal(facts | (_longest(rows) if tokenizer is not None else {}))


def _checked(section: PairsSection, given_field: str | None, answered: bool, needs: Mapping[str, str]) -> Iterator[Row]:
    conversational: bool | None = None
    layout = ""
    for source in stream_rows(section):
        if source.fields is not None and not layout:
            section, layout = recognized(source.fields, section, "examples")
        try:
            row = _pair(section, source, given_field, answered, needs)
            if conversational is None:
                conversational = row["messages"] is not None
            elif conversational != (row["messages"] is not None):
                kinds = ("text", "a conversation")
                raise RejectedError(
                    f"{section.prompt_field} is {kinds[not conversational]}, those before are {kinds[conversational]}"
                )
            yield row
        except RejectedError as error:
            content = source.text or json.dumps(source.fields, ensure_ascii=False, default=str)
            yield {"source": source.number, "reason": str(error), "content": content}


def _pair(section: PairsSection, source: SourceRow, given_field: str | None, answered: bool, needs: Mapping[str, str]) -> Row:
    if source.fields is None:
        raise RejectedError(source.problem)
    fields = dict(source.fields)
    prompt = as_conversation(_field(fields, section.prompt_field))
    if is_transcript(prompt) and fields.get(section.response_field) is None:
        prompt = read_transcript(str(prompt))
    if isinstance(prompt, list) and fields.get(section.response_field) is None and ends_with_answer(prompt):
        # A whole conversation: its last message is the answer.
        fields[section.response_field], prompt = prompt[-1:], prompt[:-1]
    messages = None
    used = (section.prompt_field, section.response_field, *((INPUT,) if section.prompt_field == INSTRUCTION else ()))
    try:
        turns = section.chat or isinstance(prompt, list)
        extras = read_extras(fields, used, ANSWERS, section.ignored_fields, "", turns=turns)
        if isinstance(prompt, list):
            prompt = with_system(check_messages(prompt, section.prompt_field), extras.system, section.prompt_field)
        elif isinstance(prompt, str):
            prompt = prompt_text(fields, prompt, section.prompt_field, None, section.prompt_field)
            if extras.system is not None and prompt.strip():
                prompt = with_system([{"role": "user", "content": prompt}], extras.system, section.prompt_field)
    except UserError as error:
        raise RejectedError(str(error).removeprefix(": ")) from error
    _refuse_parts(section, extras, prompt)
    if lacks := unmet_need(fields, needs):
        raise RejectedError(lacks)
    lost = extra_keys(prompt) if isinstance(prompt, list) else set()
    if isinstance(prompt, list):
        messages = json.dumps([{"role": one["role"], "content": one["content"]} for one in prompt], ensure_ascii=False)
        prompt = prompt[-1]["content"]
    if not answered and fields.get(section.response_field) is None:
        fields[section.response_field] = ""
    response, keys = _only_message(_field(fields, section.response_field))
    if isinstance(response, str) and isinstance(prompt, str) and starts_with_prompt(prompt, response):
        raise RejectedError(f"{section.response_field} repeats the prompt")
    row = {
        "source": source.number,
        "prompt": _text(prompt, section.prompt_field),
        "messages": messages,
        "response": _text(response, section.response_field, may_be_empty=not answered),
        "prompt_tokens": None,
        "response_tokens": None,
        "lost": lost | keys,
    }
    if given_field is not None:
        fields[GIVEN] = _text(_field(fields, given_field), given_field, may_be_empty=True)
    others = {name: value for name, value in fields.items() if name not in (section.prompt_field, section.response_field)}
    row["columns"] = json.dumps(others, ensure_ascii=False, default=str)
    return row


def _refuse_parts(section: PairsSection, extras: Extras, prompt: object) -> None:
    """Reject unsupported parts: tools, tool calls, reasoning, and answers labeled false."""
    if extras.rejected:
        raise RejectedError(LABEL_FALSE)
    lost = list(extras.options or ()) + sorted(extra_keys(prompt) & CONTENT_KEYS if isinstance(prompt, list) else ())
    if lost:
        raise RejectedError(f"{section.prompt_field}: {lost[0]}: not supported by this command")


def _field(fields: dict[str, Any], name: str) -> Any:
    if name not in fields or fields[name] is None:
        raise RejectedError(f"no field {name}")
    return fields[name]


def _only_message(value: object) -> tuple[Any, set[str]]:
    """Unwrap a response that is one assistant message.

    Returns it, and the message's keys that are not used.
    """
    value = as_conversation(value)
    if not (isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)):
        return value, set()
    try:
        [message] = check_turns(value, "answer")
    except UserError as error:
        raise RejectedError(str(error)) from error
    keys = extra_keys([message])
    if lost := keys & CONTENT_KEYS:
        raise RejectedError(f"answer: {min(lost)}: not supported by this command")
    return message["content"], keys


def _text(value: object, name: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise RejectedError(f"{name} is not text")
    if not value.strip() and not may_be_empty:
        raise RejectedError(f"{name} is empty")
    return value


def _measure(section: PairsSection, rows: Sequence[Row], tokenizer: Tokenizer, longest: int | None) -> None:
    """Count tokens, and mark rows that do not fit as rejected."""
    prompts = [row["prompt"] for row in rows]
    encoded = encode_prompts(tokenizer, section, prompts, [row["messages"] for row in rows], [row["source"] for row in rows])
    responses = tokenizer([row["response"] for row in rows], add_special_tokens=False, return_attention_mask=False)["input_ids"]
    for row, prompt_ids, response_ids in zip(rows, encoded, responses, strict=True):
        row["prompt_tokens"], row["response_tokens"] = len(prompt_ids), len(response_ids)
        if longest is not None and len(prompt_ids) + len(response_ids) + 1 > longest:
            row["reason"] = f"longer than {longest} tokens"
            row["content"] = json.dumps({"prompt": row["prompt"], "response": row["response"]}, ensure_ascii=False)


def _write_rows(folder: PartFolder, index: int, rows: Sequence[Row], first: int) -> int:
    import pyarrow as pa

    for offset, row in enumerate(rows):
        row["row"] = first + offset
    folder.write(index, pa.Table.from_pylist(list(rows), schema=row_schema()))
    return first + len(rows)


def _write_rejected(folder: PartFolder, index: int, rows: list[Row]) -> int:
    import pyarrow as pa

    folder.write(index, pa.Table.from_pylist(rows, schema=rejected_schema()))
    rows.clear()
    return index + 1


def _rejected_row(row: Row) -> Row:
    return {"source": row["source"], "reason": row["reason"], "content": replace_surrogates(row["content"][:MAX_CONTENT])}


def _check_share(
    section: PairsSection, reasons: Counter[str], total: int, usable: int, first: Row | None, place: str = ""
) -> None:
    if total == 0:
        raise UserError(f"{section.path}: the dataset has no rows")
    bad = total - usable
    if first is None or (usable and bad <= section.max_rejected_share * total):
        return
    shown = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
    found = f"; the first is row {first['source']}"
    if first["reason"].startswith("no field"):
        columns = ", ".join(json.loads(first["content"])) or "nothing"
        found = f"; row {first['source']} has {columns}: name the columns with data.prompt_field and data.response_field"
    raise UserError(
        f"{section.path}: {bad} of {total} rows are unusable, expected at most {section.max_rejected_share:.1%} "
        f"(data.max_rejected_share): {shown}{found}{place}"
    )


def describe_examples(
    section: PairsSection,
    *,
    given_field: str | None = None,
    answered: bool = True,
    needs: Mapping[str, str] = MappingProxyType({}),
    check: Callable[[Row], object] | None = None,
) -> str:
    """Return counts, format and columns of a dataset in words.

    All rows are read as `ingest_dataset` does, and not stored.

    Args:
        section: the dataset.
        given_field: as in `ingest_dataset`.
        answered: as in `ingest_dataset`.
        needs: as in `ingest_dataset`.
        check: called with each usable row; its errors are the dataset's.

    Raises:
        UserError: as `ingest_dataset`.
    """
    start = next((source.fields for source in stream_rows(section) if source.fields is not None), {})
    known, layout = recognized(start, section, "examples")
    reasons: Counter[str] = Counter()
    columns: set[str] = set()
    lost: set[str] = set()
    usable = 0
    first: Row | None = None
    for row in _checked(section, given_field, answered, needs):
        if "reason" in row:
            reasons[row["reason"]] += 1
            first = first or _rejected_row(row)
        else:
            usable += 1
            if check is not None:
                check(row)
            lost |= set(row["lost"])
            columns |= {name for name, value in json.loads(row["columns"]).items() if value is not None} - {GIVEN}
    _check_share(section, reasons, usable + sum(reasons.values()), usable, first)
    named = {name for name in (given_field, getattr(section, "task_field", None), *needs) if name in columns}
    used = used_extras(columns, known, ANSWERS) | named
    text = f"{section.path}: {usable} of {usable + sum(reasons.values())} rows, read as {layout}: "
    text += ", ".join(filter(None, [known.prompt_field, known.response_field, *sorted(used)]))
    text += f"; not used: {', '.join(sorted(columns - used))}" if columns - used else ""
    return text + (f"; message keys that are not used: {', '.join(sorted(lost))}" if lost else "")


def _longest(rows: PartFolder) -> dict[str, int]:
    """Return the tokens of the longest prompt and of the longest response."""
    import pyarrow.compute as pc

    longest = {"longest_prompt": 0, "longest_response": 0}
    for table in rows.tables(["prompt_tokens", "response_tokens"]):
        for key, column in zip(longest, table.columns, strict=True):
            longest[key] = max(longest[key], int(pc.max(column).as_py()))
    return longest


def _fingerprint(section: PairsSection) -> str | None:
    """Return sizes and modification times of the files; None for other datasets."""
    named = DatasetSection(path=section.path, split=section.split, subset=section.subset)
    states = [file.stat() for file in data_files(named) if file.is_file()]
    return "; ".join(f"{state.st_size} bytes, {state.st_mtime_ns} ns" for state in states) or None
