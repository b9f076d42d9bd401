"""Rewards for the form of a response."""

import pytest

from rayrlhf.errors import UserError
from rayrlhf.rewards.formats import matches_format, matches_json_schema


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


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "number", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ('{"name": "Ada", "age": 36}', 1.0),
        (' {"name": "Ada"}\n', 1.0),
        ('{"age": 36}', 0.0),
        ('{"name": "Ada", "age": -1}', 0.0),
        ('{"name": "Ada", "age": "36"}', 0.0),
        ('{"name": "Ada", "more": 1}', 0.0),
        ('{"name": "Ada", "age": NaN}', 0.0),
        ('{"name": "Ada", "age": Infinity}', 0.0),
        ('{"name": "Ada"} and more', 0.0),
        ('{"name": "Ada"', 0.0),
        ("[" * 200_000, 0.0),
        ("", 0.0),
    ],
)
def test_only_json_that_fits_the_schema_is_rewarded(response, reward):
    assert matches_json_schema([response], PERSON) == [reward]


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ('so\n```json\n{"name": "Ada"}\n```\ndone', 1.0),
        ('```\n1\n``` no:\n```\n{"name": "Ada"}\n```', 1.0),
        ('```\n{"name": "Ada"}\n``` no:\n```\n1\n```', 0.0),
        ('```\n{"name": "Ada"}\n``` and ```\n1', 1.0),
        ('```json\n{"name": "Ada"}', 0.0),
        ('{"name": "Ada"}', 0.0),
    ],
)
def test_the_last_closed_block_counts_when_fenced(response, reward):
    assert matches_json_schema([response], PERSON, where="fenced") == [reward]


def test_mistakes_are_one_clear_line_and_no_reference_is_fetched():
    with pytest.raises(UserError, match=r"json_schema\.type: 'text' is not valid"):
        matches_json_schema(["1"], {"type": "text"})
    with pytest.raises(UserError, match="a reference leads out of the schema"):
        matches_json_schema(["1"], {"$ref": "http://127.0.0.1:9/schema.json"})
    with pytest.raises(UserError, match="where 'all': expected 'whole' or 'fenced'"):
        matches_json_schema(["1"], PERSON, where="all")  # type: ignore[arg-type]
