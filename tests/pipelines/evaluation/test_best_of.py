"""Best-of-k and pass@k against all subsets, the published formula, and simulated tries."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from rayrlhf.pipelines.evaluation.evaluate_model import best_of, pass_at, powers_of_two


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_best_of_k_is_the_mean_of_the_best_over_all_subsets(k):
    scores = np.random.default_rng(k).normal(size=(5, 6)).round(1)
    expected = [np.mean([max(subset) for subset in combinations(row, k)]) for row in scores]
    np.testing.assert_allclose(best_of(scores, k), expected, rtol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_pass_at_k_is_one_minus_the_share_of_subsets_without_a_right_try(k):
    scores = (np.random.default_rng(k).random((20, 8)) < 0.3).astype(float)
    right = scores.sum(1).astype(int)
    expected = [1 - comb(8 - count, k) / comb(8, k) for count in right]  # Chen et al. (2021), equation 1
    np.testing.assert_allclose(pass_at(scores, k), expected, rtol=1e-12, atol=1e-15)


def test_another_judge_chooses_and_the_score_counts():
    scores, judge = np.array([[1.0, 2.0, 3.0]]), np.array([[9.0, 5.0, 1.0]])
    assert best_of(scores, 3, chosen_by=judge).tolist() == [1.0]
    expected = np.mean([scores[0][max(pair, key=lambda at: judge[0][at])] for pair in combinations(range(3), 2)])
    assert best_of(scores, 2, chosen_by=judge)[0] == pytest.approx(expected)
    assert best_of(scores, 1, chosen_by=judge)[0] == pytest.approx(2.0)


def test_a_sample_that_the_judge_did_not_score_is_never_the_best():
    assert best_of([[1.0, 2.0, 3.0]], 3, chosen_by=[[0.1, 0.2, np.nan]]).tolist() == [2.0]


def test_the_estimate_has_no_bias_where_the_plain_power_has_one():
    generator = np.random.default_rng(0)
    tries = (generator.random((200_000, 5)) < 0.3).astype(float)
    truth = 1 - 0.7**3
    assert pass_at(tries, 3).mean() == pytest.approx(truth, abs=0.003)
    assert abs((1 - (1 - tries.mean(1)) ** 3).mean() - truth) > 0.03


def test_a_threshold_tells_right_from_wrong():
    assert pass_at([[0.4, 0.6]], 2, right_from=0.5).tolist() == [1.0]
    assert pass_at([[0.4, 0.6]], 1, right_from=0.5).tolist() == [0.5]
    assert pass_at([[0.4, 0.6]], 2).tolist() == [0.0]


def test_more_tries_than_there_are_cannot_be_estimated():
    with pytest.raises(ValueError, match="k 3: expected 1 to 2"):
        best_of([[0.0, 1.0]], 3)


@pytest.mark.parametrize(("tries", "expected"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_powers_of_two_and_all_tries_are_reported(tries, expected):
    assert powers_of_two(tries) == expected
