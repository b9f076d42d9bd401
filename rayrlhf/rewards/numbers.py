"""Numbers as people and models write them, read out of free text.

One linear scan finds them: thousands separators (`1,234`), decimals (`3.50`, `.5`), a minus sign that is one (`-5`, but not
the second half of `12-5`), currency signs, and any Unicode decimal digit. Fractions, exponents and words are not read. Numbers
are `Decimal`, so `3.0` equals `3`, `0.1` is what it says, and length has no limit.
"""

import re
from collections import deque
from decimal import Decimal

_NUMBER = re.compile(
    r"""
    (?P<minus> (?<![\w)\]}]) [-\u2212] )?  # after a digit, a letter or a bracket it is a subtraction or a hyphen
    [$€£]?
    (?P<digits>
        \d{1,3} (?: ,\d{3} )+ (?!\d) (?: \.\d+ )?
      | \d+ (?: \.\d+ )?
      | (?<![\w.]) \.\d+
    )
    """,
    re.VERBOSE,
)
_MARKER = re.compile(r"####|\\boxed\{|\banswer\s*:", re.IGNORECASE)


def numbers_in(text: str) -> list[Decimal]:
    """Return the numbers of a text in order."""
    return [_decimal(match) for match in _NUMBER.finditer(text)]


def final_number(text: str) -> Decimal | None:
    r"""Return the number that a response gives as its answer, or None if it has none.

    The last of the markers `Answer:`, `####` and `\boxed{` decides: the answer is the last number on the first line after it
    that has one (inside the braces for `\boxed{`). Without a marker, or with no number after it, it is the last number of all.
    """
    text = text.replace("{,}", ",")  # LaTeX's thousands separator
    for marker in deque(_MARKER.finditer(text), maxlen=1):  # the last one, or none
        rest = text[marker.end() :]
        if marker.group().endswith("{"):
            rest = rest.partition("}")[0]
        for line in rest.splitlines():
            if numbers := numbers_in(line):
                return numbers[-1]
    numbers = numbers_in(text)
    return numbers[-1] if numbers else None


def _decimal(match: re.Match[str]) -> Decimal:
    value = Decimal(match["digits"].replace(",", ""))
    return value.copy_negate() if match["minus"] else value
