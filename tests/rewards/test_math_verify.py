"""Mathematical answers, compared by Math-Verify in a process of its own."""

import time

import pytest

pytest.importorskip("math_verify")

from rayrlhf.errors import UserError
from rayrlhf.rewards import math_verify as module
from rayrlhf.rewards.math_verify import math_verify

CASES = [
    ("42", "The answer is 42.", 1.0),
    ("42", "The answer is 41.", 0.0),
    ("42", "", 0.0),
    (r"\frac{1}{2}", "so it is $0.5$", 1.0),
    (r"so we get \boxed{\frac{3}{4}}", r"\boxed{0.75}", 1.0),
    ("$x^2 + 2x + 1$", "thus $(x + 1)^2$", 1.0),
    ("$x^2 + 2x + 1$", "thus $(x + 2)^2$", 0.0),
    (r"\{1, 2\}", r"$\{2, 1\}$", 1.0),
    ("(1, 2]", "$(1, 2]$", 1.0),
    ("(1, 2]", "$(1, 2)$", 0.0),
    ("1,234", "1234", 1.0),
    ("There are 42 of them.", "$42$", 1.0),
    ("7", "the word seven", 0.0),
]


def test_expressions_are_compared_and_not_texts():
    answers, responses, expected = zip(*CASES, strict=True)
    assert math_verify(list(responses), list(answers)) == list(expected)


def test_a_comparison_that_computes_for_ever_is_not_right_and_the_next_ones_go_on():
    endless = "$" + "+".join(f"{n}^{{{10**8 + n}}}" for n in range(3, 40)) + "$"
    begun = time.monotonic()
    assert math_verify([endless, "$7$"], ["7", "7"], seconds=0.7) == [0.0, 1.0]
    assert time.monotonic() - begun < 60


def test_a_process_that_died_between_two_batches_is_started_again():
    assert math_verify(["$7$"], [7]) == [1.0]
    assert module._worker._process is not None
    module._worker._process.kill()
    module._worker._process.wait()
    assert math_verify(["$7$"], [7]) == [1.0]


def test_mistakes_are_one_clear_line(monkeypatch):
    with pytest.raises(UserError, match="column 'answer' of sample 1 has no expression: ''"):
        math_verify(["7", "7"], ["7", ""])
    with pytest.raises(UserError, match="seconds 0: expected more than 0"):
        math_verify(["7"], ["7"], seconds=0)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package `math-verify`"):
        math_verify(["7"], ["7"])
