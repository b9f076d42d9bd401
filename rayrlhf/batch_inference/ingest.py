"""Data ingestion: every row is read, checked and numbered before anything is generated.

Bad data is found before it costs GPU time. Usable rows become part files, the others go to a `rejected` table with the reason.
Which rows are usable depends only on the data and the model's context. One part is in memory at a time.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.batch_inference.source import SourceRow, rejected_schema, replace_surrogates, row_schema, stream_rows
from rayrlhf.batch_inference.stored_prompts import encode_prompts
from rayrlhf.config.batch_inference import PairsSection
from rayrlhf.data.templates import check_messages
from rayrlhf.errors import UserError
from rayrlhf.library_types import Tokenizer

GIVEN = "given_response"
"""Key in a row's `columns` of a response that the dataset provides."""
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
) -> None:
    """Read a dataset into part files, unless they are complete.

    Args:
        tokenizer: of the model; None leaves lengths unchecked.
        longest: maximum tokens of prompt, response and end of sequence; None leaves lengths unchecked.
        given_field: a field with a model's response, stored under `GIVEN`.
        answered: True requires a response in each row; False stores "" where a row has none.

    Raises:
        UserError: no such dataset; too many unusable rows, or no usable one; the dataset changed since an earlier start.
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
        # A part holds the usable ones of `rows_per_part` rows. Numbers have no gaps across parts.
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
        "messages": messages if messages is None else replace_surrogates(messages),
        "response": _text(response, section.response_field, may_be_empty=not answered),
        "prompt_tokens": None,
        "response_tokens": None,
    }
    if given_field is not None:
        fields[GIVEN] = _text(_field(fields, given_field), given_field, may_be_empty=True)
    others = {name: value for name, value in fields.items() if name not in (section.prompt_field, section.response_field)}
    row["columns"] = replace_surrogates(json.dumps(others, ensure_ascii=False, default=str))
    return row


def _field(fields: dict[str, Any], name: str) -> Any:
    if name not in fields or fields[name] is None:
        raise RejectedError(f"no field {name}")
    return fields[name]


def _only_message(value: object) -> Any:
    """Unwrap a response that is a list with one assistant message."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return value[0].get("content")
    return value


def _text(value: object, name: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise RejectedError(f"{name} is not text")
    if not value.strip() and not may_be_empty:
        raise RejectedError(f"{name} is empty")
    return replace_surrogates(value)


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
    """Return the tokens of the longest prompt and of the longest response."""
    import pyarrow.compute as pc

    longest = {"longest_prompt": 0, "longest_response": 0}
    for table in rows.tables(["prompt_tokens", "response_tokens"]):
        for key, column in zip(longest, table.columns, strict=True):
            longest[key] = max(longest[key], int(pc.max(column).as_py()))
    return longest


def _fingerprint(path: str) -> str | None:
    """Return size and modification time of a file; None for other datasets."""
    file = Path(path).expanduser()
    if not file.is_file():
        return None
    status = file.stat()
    return f"{status.st_size} bytes, {status.st_mtime_ns} ns"
