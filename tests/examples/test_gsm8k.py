"""The GSM8K example's dense reward: right, grounded calculations count, and nothing else does."""

import pytest

from examples.gsm8k.calculations import calculations

QUESTION = "Natalia sold 58 clips in April, and half as many in May. How many in all?"
SOLUTION = "In May 58/2 = <<58/2=29>>29. In all 58+29 = <<58+29=87>>87.\n#### 87"


def score(response):
    return calculations([QUESTION], [response], [SOLUTION])[0]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (SOLUTION, 1.0),
        ("<<58/2=29>>", 0.5),
        ("<<58/2=25>> <<58+29=87>>", 0.0),
        ("<<58/2=29>> <<58+29=88>>", 0.5),
        ("#### 87", 0.0),
        ("<<58=58>> <<87=87>>", 0.0),
        ("<<2+2=4>> <<3+3=6>>", 0.0),
        ("<<58/2=29>> " * 4, 0.25),
        ("<<58/0=0>> <<58+29*(=87>>", 0.0),
        ("<<58.0/2=29.0>> <<29+58.00=87>>", 1.0),
        ("<<" + "58+" * 100 + "58=5858>>", 0.0),
        ("<<__import__('os')=1>> <<58**9=1>>", 0.0),
    ],
)
def test_a_response_earns_its_right_grounded_calculations(response, expected):
    assert score(response) == pytest.approx(expected)


def test_an_earlier_result_may_be_used_but_only_after_it_was_written():
    assert score("<<29+58=87>> <<58/2=29>>") == pytest.approx(0.5)
