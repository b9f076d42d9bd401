import torch
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.algorithms.reward_shaping import overlong_penalty


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(2, 30), st.data())
def test_the_penalty_is_that_of_trls_reward_function(lengths: list[int], limit: int, data: st.DataObject) -> None:
    from trl.rewards import get_soft_overlong_punishment

    buffer = data.draw(st.integers(1, limit))
    theirs = get_soft_overlong_punishment(limit, buffer)([[1] * length for length in lengths])
    ours = overlong_penalty(torch.tensor(lengths), limit, buffer)
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float32), atol=1e-6, rtol=0)
