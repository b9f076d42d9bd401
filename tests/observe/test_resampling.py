"""Bootstrap intervals against known distributions and the normal approximation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.observe.resampling import bootstrap_mean, bootstrap_paired_difference, distinct_share


def test_the_interval_agrees_with_the_normal_one_on_many_values():
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    interval = bootstrap_mean(values)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    generator = np.random.default_rng(2)
    intervals = [bootstrap_mean(generator.exponential(1.0, 100), level=0.9, resamples=500, seed=i) for i in range(300)]
    assert np.mean([i.low <= 1.0 <= i.high for i in intervals]) == pytest.approx(0.88, abs=0.06)


def test_pairs_cancel_what_they_share():
    generator = np.random.default_rng(3)
    before = generator.normal(0, 10, 200)
    after = before + 0.5 + generator.normal(0, 0.1, 200)
    paired = bootstrap_paired_difference(before, after)
    assert paired.low > 0.45
    assert paired.high < 0.55
    assert bootstrap_mean(after).low < bootstrap_mean(before).high


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.integers(0, 5))
def test_the_interval_lies_within_the_values_and_repeats_with_the_seed(values: list[float], seed: int):
    interval = bootstrap_mean(values, resamples=200, seed=seed)
    assert min(values) - 1e-9 <= interval.low <= interval.high <= max(values) + 1e-9
    assert interval == bootstrap_mean(values, resamples=200, seed=seed)


def test_one_value_is_its_own_interval():
    assert str(bootstrap_mean([0.5])) == "0.500 [0.500, 0.500]"


def test_resampling_in_chunks_gives_as_many_means(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rayrlhf.observe.resampling._RESAMPLED_VALUES_AT_ONCE", 70)
    interval = bootstrap_mean(np.arange(10.0), resamples=999)
    assert interval.low < 4.5 < interval.high


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [[1.0], [2.0]]])
def test_what_has_no_mean_is_refused(values: list):
    with pytest.raises(ValueError, match="at least one finite value"):
        bootstrap_mean(values)


def test_pairs_of_different_number_are_refused():
    with pytest.raises(ValueError, match="equal numbers"):
        bootstrap_paired_difference([1.0], [1.0, 2.0])


def test_the_distinct_share_shows_a_collapse():
    assert distinct_share(["a"] * 10) == 0.1
    assert distinct_share(["a", "b", "b", "c"]) == 0.75
    assert math.isnan(distinct_share([]))
