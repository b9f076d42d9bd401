"""Seeds of responses: stable, spread, and different for different requests."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.seeds import sample_seed

number = st.integers(0, 2**40)


@given(number, number, number, number)
def test_a_seed_is_a_non_negative_63_bit_number(run_seed, step, prompt, sample):
    assert 0 <= sample_seed(run_seed, step, prompt, sample) < 2**63


def test_seeds_never_change_from_release_to_release():
    assert sample_seed(0, 0, 0, 0) == 5809880761037817570
    assert sample_seed(1, 2, 3, 4) == 7597657864365363701


def test_neighboring_requests_have_unrelated_seeds():
    seeds = {sample_seed(*key) for key in itertools.product(range(5), repeat=4)}
    assert len(seeds) == 5**4
    assert len({seed % 2**31 for seed in seeds}) == 5**4
    ones = [sum(seed >> bit & 1 for seed in seeds) / len(seeds) for bit in range(63)]
    assert all(0.4 < share < 0.6 for share in ones)
