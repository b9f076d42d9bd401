"""GSM8K's final-answer check (Cobbe et al. 2021), and numbers in free text.

One linear scan finds the numbers of a text: thousands separators (`1,234`), decimals (`3.50`, `.5`), a minus sign (`-5`, but
not the second half of `12-5`), currency signs, and any Unicode decimal digit. Fractions, exponents and words are not read.
Numbers are `Decimal`, so `3.0` equals `3`, `0.1` is exact, and length has no limit.
"""

import re
from collections import deque
from decimal import Decimal

from rayrlhf.errors import UserError

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


def gsm8k(responses: list[str], answer: list[str | int | float]) -> list[float]:
    """Return 1.0 for each response whose final number equals the reference's, else 0.0.

    Args:
        responses: [B]. See `final_number` for the number that counts.
        answer: [B], the dataset's column: a worked solution that ends in `#### N`, or the number itself.

    Raises:
        UserError: a reference answer has no number.
    """
    expected = [reference_number(index, value) for index, value in enumerate(answer)]
    return [float(final_number(response) == number) for response, number in zip(responses, expected, strict=True)]


def reference_number(index: int, answer: str | int | float) -> Decimal:
    """Return the number of a dataset's answer.

    Raises:
        UserError: there is none; the message names the sample.
    """
    number = final_number(str(answer))
    if number is None:
        raise UserError(f"column 'answer' of sample {index} has no number: {str(answer)[:60]!r}; expected '#### N' or a number")
    return number


def numbers_in(text: str) -> list[Decimal]:
    """Return the numbers of a text in order."""
    return [_decimal(match) for match in _NUMBER.finditer(text)]


def final_number(text: str) -> Decimal | None:
    r"""Return the final number of a response, or None if it has none.

    The last of the markers `Answer:`, `####` and `\boxed{` decides: the final number is the last one on the first line after
    it that has one (inside the braces for `\boxed{`). Without a marker, or with no number after it, the text's last one.
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
