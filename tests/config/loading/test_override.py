"""Overrides reach any place of the tree, and say so when there is none."""

import pytest

from rayrlhf.config.loading.load import apply_override
from rayrlhf.errors import UserError


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.b=2", {"a": {"b": 2, "c": [1, 2]}, "n": None}),
        ("a.new.deep=x", {"a": {"b": 1, "c": [1, 2], "new": {"deep": "x"}}, "n": None}),
        ("a.c.0=9", {"a": {"b": 1, "c": [9, 2]}, "n": None}),
        ("a.c.2=3", {"a": {"b": 1, "c": [1, 2, 3]}, "n": None}),
        ("n.x=1", {"a": {"b": 1, "c": [1, 2]}, "n": {"x": 1}}),
        ("n.0.name=f", {"a": {"b": 1, "c": [1, 2]}, "n": [{"name": "f"}]}),
        ("a={d: [1e-3, on]}", {"a": {"d": [1e-3, "on"]}, "n": None}),
        ("a.b=", {"a": {"b": None, "c": [1, 2]}, "n": None}),
        ("a.b=x=y", {"a": {"b": "x=y", "c": [1, 2]}, "n": None}),
    ],
)
def test_an_override_sets_one_place(override, expected):
    tree = {"a": {"b": 1, "c": [1, 2]}, "n": None}
    assert apply_override(tree, override) == override.partition("=")[0]
    assert tree == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a.b", "command line: a.b: expected section.key=value"),
        ("=1", "expected section.key=value"),
        ("a..b=1", "expected section.key=value"),
        ("a.b=[1", "command line: a.b: the value is not YAML"),
        ("a.b.c=1", "command line: a.b.c: a.b is a value, expected a section or a list"),
        ("a.c.5=1", "command line: a.c.5: 5 is no index in a list of 2, expected 0 to 2"),
        ("a.c.x=1", "command line: a.c.x: x is no index in a list of 2"),
    ],
)
def test_an_override_that_reaches_nothing_is_one_line(override, message):
    with pytest.raises(UserError) as caught:
        apply_override({"a": {"b": 1, "c": [1, 2]}}, override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
