"""Curves are thinned without losing spikes, and derived without inventing steps."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.tools.report.metric_series import Series, per_step, quotient, series_by_name, thinned
from rayrlhf.tools.report.run_curves import staleness, with_derived
from rayrlhf.tools.report.run_state import RunState
from rayrlhf.tools.report.run_view import RunView


def test_metrics_of_several_lines_of_a_step_are_one_series_and_the_last_taking_counts():
    rows = [{"step": 0, "e": 1.0}, {"step": 2, "a": 5.0}, {"step": 1, "a": 4.0}, {"step": 2, "a": 6.0}, {"step": 2, "e": 2.0}]
    found = series_by_name(rows)
    assert found == {"e": Series([0, 2], [1.0, 2.0]), "a": Series([1, 2], [4.0, 6.0])}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(1, 60))
def test_a_thinned_series_keeps_its_extremes_and_its_mean(values: list[float], segments: int):
    steps = list(range(1, len(values) + 1))
    drawn = thinned(Series(steps, values), segments)
    xs, ys = drawn.points
    assert len(xs) == len(ys) <= 2 * segments
    assert xs == sorted(xs)
    assert min(ys) == pytest.approx(min(values), rel=1e-5)
    assert max(ys) == pytest.approx(max(values), rel=1e-5)
    low, high = min(values), max(values)
    assert all(low - 1e-5 * abs(low) - 1e-9 <= mean <= high + 1e-5 * abs(high) + 1e-9 for mean in drawn.means[1])


def test_the_mean_of_equal_segments_is_the_mean_of_the_series():
    values = [float(value) for value in range(1000)]
    means = thinned(Series(list(range(1000)), values), 250).means[1]
    assert sum(means) / len(means) == pytest.approx(sum(values) / len(values))


def test_growth_is_counted_per_step_also_over_a_gap():
    assert per_step(Series([1, 2, 4], [10.0, 14.0, 24.0])) == Series([2, 4], [4.0, 5.0])


def test_a_quotient_is_taken_only_where_both_are_there_and_the_divisor_is_not_zero():
    assert quotient(Series([1, 2, 3], [4.0, 6.0, 8.0]), Series([2, 3, 4], [3.0, 0.0, 1.0])) == Series([2], [2.0])


def test_the_cost_of_a_response_is_the_steps_time_by_the_responses_of_that_step():
    series = {"time/step": Series([1, 2], [8.0, 6.0]), "episode": Series([1, 2], [4, 6])}
    view = RunView(folder=Path(), kind="PPO", state=RunState("finished", 2, 2), series=series)
    assert with_derived(view)["derived/seconds_per_response"] == Series([1, 2], [2.0, 3.0])


def test_staleness_is_the_version_that_trained_less_the_one_that_sampled():
    versions = Series([1, 2, 3], [2.0, 3.0, 4.0])
    rows = [
        {"step": 2, "version": 2},
        {"step": 3, "version": 1},
        {"step": 3, "version": 3},
        {"step": 9, "version": 1},
        {"step": 3},
    ]
    assert staleness(rows, versions) == Series([2, 3], [0.0, 1.0])
    assert staleness(rows, None) == Series([], [])
