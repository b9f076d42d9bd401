"""The final-answer check, and numbers in free text: a table of examples, and properties over random text."""

import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.errors import UserError
from rayrlhf.rewards.gsm8k import final_number, gsm8k, numbers_in

SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72 clips.\n#### 72"


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("48 + 24 = 72\n#### 72", SOLUTION, 1.0),
        ("She sold 72 clips.", SOLUTION, 1.0),
        ("Answer: 71", SOLUTION, 0.0),
        ("72 is wrong. Answer: 71", SOLUTION, 0.0),
        ("", SOLUTION, 0.0),
        ("seventy-two", SOLUTION, 0.0),
        ("It is $1,450.00.", "#### 1450", 1.0),
        ("3.0", "3", 1.0),
        ("3", 3, 1.0),
        ("3", 3.0, 1.0),
        ("-5", "#### -5", 1.0),
        ("5", "#### -5", 0.0),
        ("1 2 3 4 5 6 7 8 9", "#### 8", 0.0),
        ("9" * 10_000, "1", 0.0),
    ],
)
def test_only_the_right_final_number_is_rewarded(response: str, answer: str, expected: float):
    assert gsm8k([response], [answer]) == [expected]


def test_a_reference_without_a_number_is_the_users_mistake():
    with pytest.raises(UserError, match=r"column 'answer' of sample 1 has no number: 'none'"):
        gsm8k(["1", "2"], ["#### 1", "none"])


LISTS = [
    ("", []),
    ("none at all", []),
    ("3 apples and 4 pears", [3, 4]),
    ("1,234", [1234]),
    ("1,234,567.89", ["1234567.89"]),
    ("1,2,3", [1, 2, 3]),
    ("1, 2 and 3,", [1, 2, 3]),
    ("12,3456", [12, 3456]),
    ("-5", [-5]),
    ("\u22125", [-5]),
    ("-$5 or $-5", [-5, -5]),
    ("12-5=7", [12, 5, 7]),
    ("12 - 5 = 7", [12, 5, 7]),
    ("12 -5", [12, -5]),
    ("(3)-4", [3, 4]),
    ("x-5", [5]),
    ("- 5 apples", [5]),
    ("$12.", [12]),
    ("€3.50!", ["3.5"]),
    (".5", ["0.5"]),
    ("3.0.1", ["3.0", 1]),
    ("50%", [50]),
    ("007", [7]),
    ("12apples", [12]),
    ("\u0663 and \uff142", [3, 42]),
    ("x² is not 2 digits", [2]),
]

FINALS = [
    ("", None),
    ("no idea", None),
    ("3 + 4 = 7", 7),
    ("So there are 7 apples, bought in 2 shops. Answer: 7", 7),
    ("Answer: 7\n\nThere are 3 shops, and 12 people.", 7),
    ("Answer: 3 + 4 = 7.", 7),
    ("Answer:\n\n  7 apples", 7),
    ("answer : 7", 7),
    ("**Answer:** 7", 7),
    ("Answer: 1 Answer: 2 Answer: 7", 7),
    ("Answer: 7 then nothing. Answer: none", 7),
    ("The answer is 7.", 7),
    ("2*3=<<2*3=6>>6\n#### 1,450", 1450),
    (r"thus \boxed{42}, not 7", 42),
    (r"thus $\boxed{1{,}234}$ in 3 steps", 1234),
    (r"\boxed{42", 42),
    ("#### 5\nAnswer: 6", 6),
    ("Answer: -5", -5),
    ("Answer: $12.", 12),
    ("Answer: 12 apples", 12),
    ("myanswer: 3 of 4", 4),
]


@pytest.mark.parametrize(("text", "expected"), LISTS)
def test_numbers_are_read_as_people_write_them(text: str, expected: list):
    assert numbers_in(text) == [Decimal(value) for value in expected]


@pytest.mark.parametrize(("text", "expected"), FINALS)
def test_the_last_marker_decides_and_else_the_last_number(text: str, expected: int | None):
    assert final_number(text) == (None if expected is None else Decimal(expected))


def test_equal_numbers_are_equal_however_they_are_written():
    assert numbers_in("3 3.0 3.00 03")[1:] == numbers_in("3 3 3 3")[1:]
    assert sum(numbers_in("0.1 0.2")) == Decimal("0.3")


@given(st.integers(-(10**12), 10**12), st.booleans())
def test_an_integer_survives_with_or_without_separators(number: int, separators: bool):
    text = f"{number:,}" if separators else str(number)
    assert numbers_in(f"so {text}, then.") == [number]
    assert final_number(f"it was 17. Answer: {text}") == number


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**6), max_value=10**6))
def test_a_decimal_survives(number: Decimal):
    assert numbers_in(f"{number:f}") == [number]


@given(st.text(max_size=200))
def test_any_text_gives_numbers_or_none_without_an_error(text: str):
    number = final_number(text)
    assert number is None or number.is_finite()


@pytest.mark.parametrize(
    "unit", ["1", "1,", "-", "$", ".", "1.", ",111", "Answer:", "Answer: 1\n", "####", r"\boxed{", "answer ", " ", "{,}"]
)
def test_time_is_linear_in_the_length(unit: str):
    # What is quadratic takes minutes at this length. The thread's own time: others may be using the machine.
    start = time.thread_time()
    final_number(unit * (100_000 // len(unit)))
    assert time.thread_time() - start < 5.0
