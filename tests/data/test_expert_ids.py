"""Expert ids as compact integers."""

import numpy as np
import pytest

from rayrlhf.data.expert_ids import OWN_CHOICE, compact, widen


@pytest.mark.parametrize(("experts", "dtype"), [(254, np.uint8), (255, np.uint16), (512, np.uint16)])
def test_ids_are_as_small_as_the_number_of_experts_allows(experts, dtype):
    ids = compact([(1, np.full((2, 3, 1), experts - 1))], 4, experts)
    assert ids.dtype == dtype
    assert widen(ids)[:, 0, 0].tolist() == [OWN_CHOICE, experts - 1, experts - 1, OWN_CHOICE]


def test_the_first_of_two_passes_counts_and_none_counts_beyond_the_sample():
    first, second = (np.full((count, 1, 1), value) for count, value in ((2, 1), (5, 2)))
    assert widen(compact([(1, first), (0, second)], 4, 8)).ravel().tolist() == [2, 1, 1, 2]
