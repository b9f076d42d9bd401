"""Rewards for the form of a response: regular expression, JSON Schema, fenced blocks.

JSON is read as RFC 8259 defines it: `NaN` and `Infinity`, which Python accepts, are invalid. A schema's references to other
documents are not fetched.
"""

import json
import re
from typing import Any, Literal

from rayrlhf.errors import UserError

Where = Literal["whole", "fenced"]
"""The whole response, or the inside of its last closed block of three backticks."""


def matches_format(
    responses: list[str], pattern: str, match: Literal["full", "search"] = "full", ignore_case: bool = False
) -> list[float]:
    """Return 1.0 for each response that matches, else 0.0.

    Args:
        responses: [B].
        pattern: a Python regular expression; `.` matches newlines, `^` and `$` the ends of lines.
        match: `full` matches the whole response less surrounding space, `search` any part of it.
        ignore_case: treat upper and lower case as the same.

    Raises:
        UserError: the pattern is not a valid regular expression, or `match` is something else.
    """
    if match not in ("full", "search"):
        raise UserError(f"reward function 'format': match {match!r}: expected 'full' or 'search'")
    try:
        compiled = re.compile(pattern, re.DOTALL | re.MULTILINE | (re.IGNORECASE if ignore_case else 0))
    except re.error as error:
        raise UserError(f"reward function 'format': pattern {pattern!r} is no regular expression: {error}") from error
    find = compiled.fullmatch if match == "full" else compiled.search
    return [float(find(response.strip()) is not None) for response in responses]


def matches_json_schema(responses: list[str], json_schema: dict[str, Any], where: Where = "whole") -> list[float]:
    """Return 1.0 for each response that is valid under the schema, else 0.0.

    Args:
        responses: [B].
        json_schema: the schema, draft 2020-12.
        where: `whole` takes the response less surrounding space, `fenced` its last block of three backticks.

    Raises:
        UserError: the schema is invalid or refers to something outside it, or `where` is something else.
    """
    # Imported on first use: only some runs need it.
    from jsonschema import Draft202012Validator, SchemaError
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    check_where("json_schema", where)
    try:
        Draft202012Validator.check_schema(json_schema)
    except SchemaError as error:
        raise UserError(f"reward function 'json_schema': json_schema{error.json_path[1:]}: {error.message}") from error
    validator = Draft202012Validator(json_schema, registry=Registry())
    try:
        return [
            float(_fits(validator, response if where == "whole" else last_block(response, ("json",)))) for response in responses
        ]
    except Unresolvable as error:
        raise UserError(f"reward function 'json_schema': a reference leads out of the schema: {error}") from error


def check_where(name: str, where: str) -> None:
    """Check an argument of type `Where`.

    Args:
        name: name of the reward function, for the message.

    Raises:
        UserError: it is something else.
    """
    if where not in ("whole", "fenced"):
        raise UserError(f"reward function {name!r}: where {where!r}: expected 'whole' or 'fenced'")


def last_block(response: str, languages: tuple[str, ...] = ()) -> str:
    """Return the inside of the last fenced block, or an empty string.

    A block is closed by three backticks. A language of `languages` at its head is removed.
    """
    pieces = response.split("```")
    if len(pieces) < 3:
        return ""
    inside = pieces[(len(pieces) - 1) // 2 * 2 - 1]
    for language in languages:
        if inside.startswith(language):
            return inside.removeprefix(language)
    return inside


def _fits(validator: Any, text: str) -> bool:
    try:
        return bool(validator.is_valid(json.loads(text, parse_constant=_refuse)))
    except (ValueError, RecursionError):  # not JSON, or nested too deeply to be an answer
        return False


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
