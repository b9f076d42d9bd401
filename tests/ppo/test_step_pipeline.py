"""How far sampling may run ahead is a pure rule: no token older than allowed, no step without samples, none beyond the run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.ppo.step_pipeline import capacity


@pytest.mark.parametrize(
    ("steps_done", "issued", "staleness", "expected"),
    [
        (0, 0, 0, 8),  # synchronous: the step at hand and no more
        (0, 8, 0, 0),
        (3, 24, 0, 8),
        (0, 0, 2, 24),  # the step at hand and two ahead
        (1, 24, 2, 8),  # one more for the step that was done
        (5, 56, 2, 8),
        (5, 64, 2, 0),
        (8, 80, 2, 0),  # the run has ten steps
        (9, 72, 2, 8),
        (12, 96, 2, 8),  # a caller that goes on beyond them is served, one step at a time
        (4, 37, 1, 11),  # a part of a step
    ],
)
def test_the_capacity_is_what_the_staleness_leaves_room_for(steps_done, issued, staleness, expected):
    assert capacity(steps_done, issued, 8, staleness, last_step=10) == expected


@given(st.data(), st.integers(0, 5), st.integers(1, 7), st.integers(1, 9))
def test_whatever_is_issued_when_no_sample_trains_too_old_and_every_step_gets_its_own(data, staleness, size, steps):
    """Samples are issued piece by piece and trained in their order; each remembers the version at its issue."""
    issued: list[int] = []
    for done in range(steps):
        while room := capacity(done, len(issued), size, staleness, steps):
            issued += [done] * data.draw(st.integers(1, room))
        assert len(issued) >= size * (done + 1)
        ages = [done - version for version in issued[size * done : size * (done + 1)]]
        assert max(ages) <= staleness
    assert len(issued) == size * steps
    assert capacity(0, 0, size, staleness, steps) == size * min(staleness + 1, steps)
