"""The way in: every row is read, checked and numbered before anything is generated, so that bad data costs no GPU hour.

Usable rows become part files, the rest goes to a `rejected` table with the reason. Which rows are usable depends on the data
and the model's context alone. Everything streams: one part is in memory at a time.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.batch_inference.source import SourceRow, schemas, storable, stream_rows
from rayrlhf.batch_inference.stored_prompts import encode_prompts
from rayrlhf.config.presft import PairsSection
from rayrlhf.data.templates import check_messages
from rayrlhf.errors import UserError

GIVEN = "given_response"
"""Key under which a response that came with the row travels in its `columns`."""
MOST_CONTENT = 2000
"""Characters of a rejected row that are kept to look at."""
REJECTED_PER_PART = 10_000

Row = dict[str, Any]


class RejectedError(Exception):
    """A row cannot be used; the message says why."""


def take_in(
    section: PairsSection,
    rows: PartFolder,
    rejected: PartFolder,
    *,
    rows_per_part: int,
    tokenizer: Any | None,
    longest: int | None,
    given_field: str | None = None,
    answered: bool = True,
) -> None:
    """Read a dataset into part files, unless that is done.

    Args:
        section: the dataset.
        rows: where usable rows go.
        rejected: where the others go.
        rows_per_part: usable rows of one part.
        tokenizer: of the model; None leaves lengths unchecked.
        longest: most tokens of prompt and response with its end; None leaves lengths unchecked.
        given_field: a field that holds a model's response, kept under `GIVEN`.
        answered: whether a row needs a response; it is "" where a row has none.

    Raises:
        UserError: no such dataset, too large a share of unusable rows, none usable, or it changed since an earlier start.
    """
    fingerprint = _fingerprint(section.path)
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
    checked = _checked(section, given_field, answered)
    while batch := list(islice(checked, rows_per_part)):
        total += len(batch)
        good = [row for row in batch if "reason" not in row]
        if tokenizer is not None and good:
            _measure(section, good, tokenizer, longest)
        for row in batch:
            if "reason" in row:
                reasons[row["reason"]] += 1
                bad.append(_rejected_row(row))
        # A part holds what is usable of `rows_per_part` read rows: rows are numbered across parts without gaps.
        good = [row for row in good if "reason" not in row]
        if good:
            count = _write_rows(rows, index, good, count)
            index += 1
        if len(bad) >= REJECTED_PER_PART:
            bad_index = _write_rejected(rejected, bad_index, bad)
    if bad:
        _write_rejected(rejected, bad_index, bad)
    _check_share(section, reasons, total, count, rejected.path)
    facts = {"rows": count, "read": total, "rejected": dict(reasons), "fingerprint": fingerprint}
    rows.seal(facts | (_longest(rows) if tokenizer is not None else {}))


def _checked(section: PairsSection, given_field: str | None, answered: bool) -> Iterator[Row]:
    conversational: bool | None = None
    for source in stream_rows(section):
        try:
            row = _pair(section, source, given_field, answered)
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


def _pair(section: PairsSection, source: SourceRow, given_field: str | None, answered: bool) -> Row:
    if source.fields is None:
        raise RejectedError(source.problem.split(":")[0])
    fields = dict(source.fields)
    prompt = _field(fields, section.prompt_field)
    messages = None
    if isinstance(prompt, list):
        try:
            checked = check_messages(prompt, section.prompt_field)
        except UserError as error:
            raise RejectedError(str(error)) from error
        messages = json.dumps(checked, ensure_ascii=False)
        prompt = checked[-1]["content"]
    if not answered and fields.get(section.response_field) is None:
        fields[section.response_field] = ""
    response = _only_message(_field(fields, section.response_field))
    row = {
        "source": source.number,
        "prompt": _text(prompt, section.prompt_field),
        "messages": messages if messages is None else storable(messages),
        "response": _text(response, section.response_field, may_be_empty=not answered),
        "prompt_tokens": None,
        "response_tokens": None,
    }
    if given_field is not None:
        fields[GIVEN] = _text(_field(fields, given_field), given_field, may_be_empty=True)
    others = {name: value for name, value in fields.items() if name not in (section.prompt_field, section.response_field)}
    row["columns"] = storable(json.dumps(others, ensure_ascii=False, default=str))
    return row


def _field(fields: dict[str, Any], name: str) -> Any:
    if name not in fields or fields[name] is None:
        raise RejectedError(f"no field {name}")
    return fields[name]


def _only_message(value: Any) -> Any:
    """A response may be one assistant message in a list."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return value[0].get("content")
    return value


def _text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise RejectedError(f"{name} is not text")
    if not value.strip() and not may_be_empty:
        raise RejectedError(f"{name} is empty")
    return storable(value)


def _measure(section: PairsSection, rows: Sequence[Row], tokenizer: Any, longest: int | None) -> None:
    """Count tokens; what does not fit is marked as rejected."""
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
    folder.write(index, pa.Table.from_pylist(list(rows), schema=schemas()["rows"]))
    return first + len(rows)


def _write_rejected(folder: PartFolder, index: int, rows: list[Row]) -> int:
    import pyarrow as pa

    folder.write(index, pa.Table.from_pylist(rows, schema=schemas()["rejected"]))
    rows.clear()
    return index + 1


def _rejected_row(row: Row) -> Row:
    return {"source": row["source"], "reason": row["reason"], "content": storable(row["content"][:MOST_CONTENT])}


def _check_share(section: PairsSection, reasons: Counter[str], total: int, usable: int, folder: Path) -> None:
    if total == 0:
        raise UserError(f"{section.path}: the dataset has no rows")
    bad = total - usable
    if usable == 0 or bad > section.max_rejected_share * total:
        shown = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        raise UserError(
            f"{section.path}: {bad} of {total} rows are unusable, expected at most {section.max_rejected_share:.1%} "
            f"(data.max_rejected_share): {shown}; all of them are in {folder}"
        )


def _longest(rows: PartFolder) -> dict[str, int]:
    """Tokens of the longest prompt and of the longest response."""
    import pyarrow.compute as pc

    longest = {"longest_prompt": 0, "longest_response": 0}
    for table in rows.tables(["prompt_tokens", "response_tokens"]):
        for key, column in zip(longest, table.columns, strict=True):
            longest[key] = max(longest[key], int(pc.max(column).as_py()))
    return longest


def _fingerprint(path: str) -> str | None:
    """Size and time of a file, by which an edit shows; None for what is no file."""
    file = Path(path).expanduser()
    if not file.is_file():
        return None
    status = file.stat()
    return f"{status.st_size} bytes, {status.st_mtime_ns} ns"
