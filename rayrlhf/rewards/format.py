"""Does a response have the asked-for form? A regular expression decides."""

import re
from typing import Literal

from rayrlhf.errors import UserError


def matches_format(
    responses: list[str], pattern: str, match: Literal["full", "search"] = "full", ignore_case: bool = False
) -> list[float]:
    """Return 1.0 for each response that matches, else 0.0.

    Args:
        responses: [B].
        pattern: a Python regular expression; `.` matches newlines, `^` and `$` the ends of lines.
        match: `full` asks for the whole response less surrounding space, `search` for any part of it.
        ignore_case: whether upper and lower case are the same.

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
