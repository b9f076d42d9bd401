"""The final-answer check."""

import pytest

from rayrlhf.errors import UserError
from rayrlhf.rewards.gsm8k import gsm8k

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
