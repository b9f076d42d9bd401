"""Held-out groups: a function of the group alone, of about the share asked for, and never all or none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.holdout import group_key, held_out

shares = st.floats(0.01, 0.99)


@given(st.lists(st.text(max_size=3), min_size=2, max_size=40).filter(lambda groups: len(set(groups)) > 1), shares)
def test_whole_groups_are_held_out_and_both_sides_have_some(groups, share):
    held = held_out(groups, share)
    sides = {side: {group for group, out in zip(groups, held, strict=True) if out is side} for side in (True, False)}
    assert sides[True]
    assert sides[False]
    assert not sides[True] & sides[False]


@given(st.integers(200, 400), st.floats(0.2, 0.8))
def test_a_group_keeps_its_side_whatever_is_around_it(count, share):
    groups = [f"question {number}" for number in range(count)]
    everywhere = dict(zip(groups, held_out(groups, share), strict=True))
    fewer = [group for number, group in enumerate(reversed(groups)) if number % 3]
    assert held_out(fewer, share) == [everywhere[group] for group in fewer]
    assert abs(sum(everywhere.values()) / count - share) < 0.15


def test_groups_have_names_and_one_group_cannot_be_divided():
    assert [group_key(value) for value in ("a", 3, {"b": 1, "a": "é"})] == ["a", "3", '{"a": "é", "b": 1}']
    with pytest.raises(ValueError, match="at least two groups"):
        held_out(["a", "a"], 0.5)
