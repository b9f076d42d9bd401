"""The soft length limit."""

import numpy as np
import pytest

from rayrlhf.data.records import Rollout, SampleKey
from rayrlhf.errors import UserError
from rayrlhf.rewards.rollout_rewards import length_penalty


def rollout(length: int) -> Rollout:
    ids = np.zeros(length, dtype=np.int32)
    return Rollout(SampleKey(0, 0, 0), ids, ids, ids == 0, ids.astype(np.float32), ids, "stop", "text", 0)


def test_tokens_cost_nothing_up_to_the_soft_limit_and_linearly_more_to_the_hard_one():
    lengths = [1, 10, 15, 20, 99]
    values = length_penalty(["text"] * 5, 10, 20, rollouts=[rollout(n) for n in lengths])
    assert values == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_characters_can_be_counted_without_rollouts():
    assert length_penalty(["", "a" * 10, "a" * 30], 10, 30, unit="characters") == [0.0, 0.0, -1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"soft_limit": 9, "hard_limit": 9}, "expected 0 <= soft_limit < hard_limit, got 9 and 9"),
        ({"soft_limit": 1, "hard_limit": 9, "unit": "words"}, "unit 'words': expected 'tokens' or 'characters'"),
        ({"soft_limit": 1, "hard_limit": 9}, "needs rollouts"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments: dict, message: str):
    with pytest.raises(UserError, match=message):
        length_penalty(["text"], **arguments)
