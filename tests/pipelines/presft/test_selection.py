"""Cuts meet their share exactly, fall the same way on ties, and the gap is where exhaustive search finds it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.batch_inference.scoring import BleuScorer
from rayrlhf.config.pipelines import SelectSection
from rayrlhf.pipelines.presft.selection import HISTOGRAM_BINS, Cut, find_cut, otsu_threshold

SCORES = st.lists(st.integers(0, 100).map(float), min_size=1, max_size=60)


def selected(section, scores):
    cut = find_cut(section, np.array(scores), np.arange(len(scores)))
    return [row for row, score in enumerate(scores) if cut.selects(score, row)]


def test_a_threshold_selects_what_is_strictly_below():
    assert selected(SelectSection(rule="threshold", value=50.0), [10.0, 50.0, 49.999, 100.0]) == [0, 2]


@given(SCORES, st.floats(0, 1))
def test_a_quantile_selects_exactly_its_share_and_the_lowest(scores, share):
    chosen = selected(SelectSection(rule="quantile", value=share), scores)
    assert len(chosen) == int(share * len(scores) + 1e-9)
    rest = [score for row, score in enumerate(scores) if row not in chosen]
    assert all(scores[row] <= other for row in chosen for other in rest)


def test_ties_fall_to_the_earlier_rows():
    assert selected(SelectSection(rule="quantile", value=0.5), [7.0, 7.0, 7.0, 7.0]) == [0, 1]


def test_a_share_that_floats_cannot_hold_is_met():
    assert len(selected(SelectSection(rule="quantile", value=0.29), [float(i) for i in range(100)])) == 29


def test_the_whole_dataset_can_be_selected():
    assert selected(SelectSection(rule="quantile", value=1.0), [100.0, 0.0, 50.0]) == [0, 1, 2]


@given(SCORES)
def test_the_gap_minimises_the_spread_within_both_sides(scores):
    """Otsu's criterion in its other form: the sum of squared distances to the own side's mean, searched exhaustively."""
    width = 100 / HISTOGRAM_BINS
    binned = np.minimum(np.floor(np.array(scores) / width), HISTOGRAM_BINS - 1) * width + width / 2

    def spread(edge):
        low, high = binned[binned < edge], binned[binned > edge]
        return None if not len(low) or not len(high) else float(low.var() * len(low) + high.var() * len(high))

    spreads = [s for edge in range(1, HISTOGRAM_BINS) if (s := spread(edge * width)) is not None]
    found = otsu_threshold(np.array(scores))
    if not spreads:
        assert found is None
        assert selected(SelectSection(), scores) == []
    else:
        assert spread(found) == pytest.approx(min(spreads), rel=1e-6, abs=1e-6)


def test_an_empty_segment_is_cut_in_its_middle():
    assert otsu_threshold(np.array([10.0] * 5 + [90.0] * 20)) == pytest.approx(50.0, abs=1.0)


def test_equal_texts_which_score_a_trace_above_100_count_as_100():
    equal = BleuScorer().score("the same four words and more", "the same four words and more")
    assert equal > 100
    scores = np.array([equal] * 50 + [80.0] * 50 + [10.0] * 50)
    assert otsu_threshold(scores) == otsu_threshold(np.minimum(scores, 100.0)) == pytest.approx(45.0, abs=1.0)


def test_a_cut_without_row_leaves_out_its_own_score():
    assert not Cut(50.0).selects(50.0, 0)
    assert Cut(50.0, 3).selects(50.0, 3)
    assert not Cut(50.0, 3).selects(50.0, 4)
