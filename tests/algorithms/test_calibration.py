"""Accuracy, calibration, histograms and the test against chance, each against a plain count."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.algorithms.calibration import (
    chance_probability,
    expected_calibration_error,
    margin_histogram,
    pair_accuracy,
    reliability,
)

differences = st.lists(st.floats(-8, 8), min_size=1, max_size=60)


@given(differences, st.integers(1, 12))
def test_reliability_counts_what_a_loop_counts(values, bins):
    members: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for value in values:
        claimed = 1 / (1 + math.exp(-abs(value)))
        right = 0.5 if value == 0 else float(value > 0)
        members[min(bins - 1, int((2 * claimed - 1) * bins))].append((claimed, right))
    found = reliability(torch.tensor(values, dtype=torch.float64), bins)
    assert sum(found.counts) == len(values)
    expected = sum(abs(sum(claimed - right for claimed, right in bin_)) for bin_ in members) / len(values)
    # A claim within rounding of an edge may fall on either side of it.
    if found.counts == [len(bin_) for bin_ in members]:
        assert found.expected_error == pytest.approx(expected, abs=1e-9)
    else:
        assert sum(abs(count - len(bin_)) for count, bin_ in zip(found.counts, members, strict=True)) <= 4


def test_an_honest_model_is_calibrated_and_a_boastful_one_is_not():
    generator = torch.Generator().manual_seed(0)
    sure = torch.rand(40_000, generator=generator) * 4
    right = torch.rand(40_000, generator=generator) < sure.sigmoid()
    honest = torch.where(right, sure, -sure)
    assert expected_calibration_error(honest) < 0.01
    assert expected_calibration_error(4 * honest) > 0.1
    assert expected_calibration_error(honest / 4) > 0.1


def test_a_model_that_says_nothing_claims_nothing():
    assert expected_calibration_error(torch.zeros(5)) == 0
    assert pair_accuracy(torch.zeros(5)) == 0
    assert pair_accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0])) == 0.5
    assert expected_calibration_error(torch.tensor([50.0, 50.0, -50.0])) == pytest.approx(1 / 3)


@given(differences, st.integers(1, 10))
def test_a_histogram_counts_every_pair_and_never_mixes_right_and_wrong(values, half):
    histogram = margin_histogram(torch.tensor(values, dtype=torch.float64), 2 * half)
    assert len(histogram.edges) == 2 * half + 1
    assert histogram.edges[half] == 0
    assert histogram.edges[0] == -histogram.edges[-1] == -(max(map(abs, values)) or 1.0)
    assert sum(histogram.counts[half:]) == sum(value >= 0 for value in values)
    assert sum(histogram.counts) == len(values)


def test_the_smallest_negative_difference_is_one_of_a_wrong_pair():
    assert margin_histogram(torch.tensor([-5e-324, 8.0], dtype=torch.float64), 2).counts == [1, 1]


def test_a_difference_falls_between_its_edges():
    values = [-2.0, -1.5, -0.1, 0.0, 0.9, 1.0, 2.0]
    histogram = margin_histogram(torch.tensor(values), 4)
    assert histogram.edges == [-2, -1, 0, 1, 2]
    assert histogram.counts == [2, 1, 2, 2]


@given(st.integers(0, 60), st.data())
def test_chance_is_the_binomial_tail(pairs, data):
    correct = data.draw(st.integers(0, pairs))
    tail = sum(math.comb(pairs, heads) for heads in range(correct, pairs + 1)) / 2**pairs
    assert chance_probability(correct, pairs) == pytest.approx(tail, rel=1e-9)


def test_chance_of_many_pairs_is_finite():
    assert chance_probability(500_000, 1_000_000) == pytest.approx(0.5, abs=1e-3)
    assert chance_probability(510_000, 1_000_000) < 1e-50
    coins = random.Random(0)
    heads = sum(coins.random() < 0.5 for _ in range(1000))
    assert chance_probability(heads, 1000) > 0.01


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="no pairs"):
        reliability(torch.tensor([]))
    with pytest.raises(ValueError, match="1 of 2 differences of rewards are not finite"):
        pair_accuracy(torch.tensor([math.nan, 1.0]))
    with pytest.raises(ValueError, match="bins must be even, not 3"):
        margin_histogram(torch.ones(1), 3)
    with pytest.raises(ValueError, match="not between 0 and pairs 3"):
        chance_probability(4, 3)
