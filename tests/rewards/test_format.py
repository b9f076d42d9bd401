"""The regular-expression reward."""

import pytest

from rayrlhf.errors import UserError
from rayrlhf.rewards.format import matches_format


def test_the_whole_response_must_match_unless_a_search_is_asked_for():
    responses = ["<think>a\nb</think>7", "so <think>a</think>7", "7\n", ""]
    assert matches_format(responses, r"<think>.*</think>\d+") == [1.0, 0.0, 0.0, 0.0]
    assert matches_format(responses, r"<think>.*</think>\d+", match="search") == [1.0, 1.0, 0.0, 0.0]
    assert matches_format(responses, r"\d") == [0.0, 0.0, 1.0, 0.0]


def test_case_counts_unless_told_otherwise():
    assert matches_format(["YES"], "yes") == [0.0]
    assert matches_format(["YES"], "yes", ignore_case=True) == [1.0]


def test_a_broken_pattern_or_mode_is_one_clear_line():
    with pytest.raises(UserError, match=r"pattern '\(' is no regular expression"):
        matches_format(["a"], "(")
    with pytest.raises(UserError, match=r"match 'whole': expected 'full' or 'search'"):
        matches_format(["a"], "a", match="whole")  # type: ignore[arg-type]
