"""The length baseline takes its direction from the training pairs and its accuracy from the held-out ones."""

import numpy as np
import pytest

from rayrlhf.data.supervised.datasets import PreferencePair, SupervisedSample
from rayrlhf.tuning.held_out import length_baseline
from rayrlhf.tuning.sample_table import PairTable


def table(*lengths):
    """Pairs with answers of the given lengths, the better one first."""

    def sample(length):
        return SupervisedSample(np.zeros(length, np.int32), np.ones(length, np.bool_), 1)

    return PairTable.of([PreferencePair(sample(better), sample(worse), None, 1) for better, worse in lengths])


@pytest.mark.parametrize(
    ("train", "held_out", "prefers", "accuracy"),
    [
        ([(5, 3), (6, 2), (1, 4)], [(9, 8), (7, 8), (5, 5), (4, 1)], "longer", 0.625),
        ([(3, 5), (2, 6), (4, 1)], [(9, 8), (7, 8), (5, 5), (4, 1)], "shorter", 0.375),
        ([(3, 5)], [(1, 2), (3, 9)], "shorter", 1.0),
        ([(3, 5)], [(2, 1), (9, 3)], "shorter", 0.0),
    ],
)
def test_the_training_pairs_choose_the_rule_and_the_held_out_ones_judge_it(train, held_out, prefers, accuracy):
    found = length_baseline(table(*train), table(*held_out))
    assert (found.prefers, found.accuracy, found.pairs) == (prefers, pytest.approx(accuracy), len(held_out))
    assert f"preferring the {prefers} answer is right on {accuracy:.1%} of {len(held_out)} held-out pairs" in found.line()
