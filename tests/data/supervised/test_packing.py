"""Packs hold every sample once and never overflow; there are as few of them as best-fit decreasing promises, as in TRL."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.supervised.packing import best_fit_decreasing


@st.composite
def problems(draw):
    capacity = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(1, capacity), max_size=60)), capacity


def first_fit(lengths, capacity):
    sums = []
    for length in lengths:
        place = next((index for index, total in enumerate(sums) if total + length <= capacity), None)
        if place is None:
            sums.append(length)
        else:
            sums[place] += length
    return sums


def plain_best_fit_decreasing(lengths, capacity):
    """The definition, in quadratic time: sums of the packs."""
    sums = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, total in enumerate(sums) if total + length <= capacity]
        if fitting:
            sums[max(fitting, key=lambda index: sums[index])] += length
        else:
            sums.append(length)
    return sums


@given(problems())
def test_every_sample_lies_in_one_pack_and_no_pack_overflows(problem):
    lengths, capacity = problem
    packs = best_fit_decreasing(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in pack) <= capacity for pack in packs)
    assert best_fit_decreasing(lengths, capacity) == packs


@given(problems())
def test_the_packs_are_those_of_the_definition(problem):
    lengths, capacity = problem
    sums = [sum(lengths[index] for index in pack) for pack in best_fit_decreasing(lengths, capacity)]
    assert Counter(sums) == Counter(plain_best_fit_decreasing(lengths, capacity))


@given(problems())
def test_the_number_of_packs_is_within_its_bounds(problem):
    lengths, capacity = problem
    packs = best_fit_decreasing(lengths, capacity)
    fewest = -(-sum(lengths) // capacity)
    # First-fit needs at least as many as the best packing, which best-fit decreasing exceeds by 11/9 and four at most.
    assert fewest <= len(packs) <= 11 / 9 * len(first_fit(lengths, capacity)) + 4
    if len(packs) > 1:
        emptiest = sorted(sum(lengths[index] for index in pack) for pack in packs)[:2]
        assert sum(emptiest) > capacity


@pytest.mark.parametrize("seed", range(5))
def test_it_needs_no_more_packs_than_first_fit_on_samples_of_real_lengths(seed):
    lengths = np.random.default_rng(seed).lognormal(5, 0.7, 2000).clip(8, 1024).astype(int).tolist()
    packs = best_fit_decreasing(lengths, 1024)
    assert len(packs) <= len(first_fit(lengths, 1024))
    assert sum(lengths) / (1024 * len(packs)) > 0.99


def test_the_packs_have_the_lengths_of_trls(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    random = np.random.default_rng(3)
    for capacity in (7, 64, 500):
        lengths = random.integers(1, capacity + 1, 300).tolist()
        rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]})
        theirs = [tuple(pack) for pack in pack_dataset(rows, capacity, "bfd")["seq_lengths"]]
        ours = [tuple(lengths[index] for index in pack) for pack in best_fit_decreasing(lengths, capacity)]
        assert Counter(ours) == Counter(theirs)


def test_many_samples_are_packed_quickly_and_bad_lengths_refused():
    assert best_fit_decreasing([], 4) == []
    assert len(best_fit_decreasing([1] * 50_000, 50)) == 1000
    for length in (0, 5):
        with pytest.raises(ValueError, match=rf"sample 1 has length {length}, expected 1 to the capacity of 4"):
            best_fit_decreasing([1, length], 4)
