"""YAML scalars mean what they say, keys are given once, and text survives the round trip."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.config.loading.yaml_text import dump, parse, problem_of

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
looks_like_something_else = st.sampled_from(
    [
        "on",
        "off",
        "yes",
        "no",
        "1e-6",
        "1.",
        "0o17",
        "010",
        "12:30",
        "2024-01-01",
        "null",
        "~",
        "",
        "true",
        ".inf",
        "<<",
        "- a",
        "a: b",
        "1_000",
        "\x85",
        "a\u2028b",
    ]
)
scalar = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text | looks_like_something_else
tree = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text | looks_like_something_else, inner, max_size=3)
)


@given(tree)
def test_what_is_dumped_is_read_back_unchanged_here_and_by_other_readers(value):
    for again in (parse(dump(value)), yaml.safe_load(dump(value))):
        assert again == value
        assert repr(again) == repr(value)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-6", 1e-6),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("", None),
        ("null", None),
        ("'5'", "5"),
        ("-.inf", -math.inf),
        ("[1, a, {b: ~}]", [1, "a", {"b": None}]),
    ],
)
def test_scalars_mean_what_they_say(written, value):
    parsed = parse(written)
    assert parsed == value
    assert type(parsed) is type(value)


def test_not_a_number_is_a_float():
    assert math.isnan(parse(".nan"))


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "key a is given twice at line 3, column 1"),
        ("s:\n  a: 1\n  a: 1\n", "key a is given twice at line 3, column 3"),
        ("{[1]: 2}", "a key must be plain text at line 1, column 2"),
        ("a: [1", "at line 1"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_a_problem_is_one_line_with_its_place(written, problem):
    with pytest.raises(yaml.YAMLError) as caught:
        parse(written)
    assert problem in problem_of(caught.value)
    assert "\n" not in problem_of(caught.value)
