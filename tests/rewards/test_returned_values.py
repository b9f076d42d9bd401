"""Rewards for tokens and turns."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.config.reward import RewardFunctionSection
from rayrlhf.data.records import Rollout, SampleKey
from rayrlhf.environments.episodes import turns
from rayrlhf.errors import UserError
from rayrlhf.rewards.functions import BoundFunction, ScoringBatch
from rayrlhf.rewards.returned_values import turn_ends
from rayrlhf.rewards.score import score_batch

MASKS = [[True, True, False, True], [True, True], [False, True, True, False, True]]


def rollout(mask: list[bool], number: int = 0) -> Rollout:
    length = len(mask)
    zeros = np.zeros(length, np.float32)
    ids = np.arange(length, dtype=np.int32)
    return Rollout(SampleKey(0, number, 0), ids, ids, np.array(mask), zeros, ids, "stop", "", 0)


BATCH = ScoringBatch(["p"] * 3, ["r"] * 3, rollouts=[rollout(mask, number) for number, mask in enumerate(MASKS)])


def pays(values: Any, per: str, weight: float = 1.0, name: str = "f") -> BoundFunction:
    return BoundFunction(name, lambda responses: values, weight, per=per)  # type: ignore[arg-type]


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_turns_end_where_a_segment_of_sampled_tokens_does(mask):
    ends = [index for index, sampled in enumerate(mask) if sampled and not (mask[index + 1 :] or [False])[0]]
    assert turn_ends(np.array(mask)).tolist() == ends
    assert len(ends) == turns(rollout(mask))


def test_the_score_is_the_weighted_sum_and_each_reward_stands_at_its_token():
    by_token = [[1, 2, None, 3], [0.5, 0.5], [0, 0, 1, 0, 0]]
    by_turn = [[1, 10], [100], [2, 4]]
    functions = [
        pays(by_token, "token", 2.0, "t"),
        pays(by_turn, "turn", 0.5, "u"),
        pays([1.0, None, 3.0], "response", 1.0, "r"),
    ]
    scored = score_batch(functions, BATCH)
    assert {name: part.tolist()[:1] for name, part in scored.parts.items()} == {"t": [6.0], "u": [11.0], "r": [1.0]}
    assert scored.scores.tolist() == [12 + 5.5 + 1, 2 + 50, 2 + 3 + 3]
    assert [row.tolist() for row in scored.tokens] == [[2, 4.5, 0, 11], [1, 51], [0, 0, 3, 0, 2]]


def test_a_function_that_does_not_apply_to_a_response_pays_it_nothing():
    scored = score_batch([pays([None, [1, 2], None], "token"), pays([1, 1, 1], "response", name="other")], BATCH)
    np.testing.assert_array_equal(scored.parts["f"], [np.nan, 3, np.nan])
    assert [None if row is None else row.tolist() for row in scored.tokens] == [None, [1, 2], None]
    assert score_batch([pays([1, 1, 1], "response")], BATCH).tokens is None
    with pytest.raises(UserError, match="no reward applies to sample 0"):
        score_batch([pays([None, [1, 2], None], "token")], BATCH)


@pytest.mark.parametrize(
    ("values", "per", "message"),
    [
        (1.0, "token", "returned float 1.0, expected a list of 3 lists"),
        ([[0] * 4, [0] * 2], "token", "expected a list of 3 lists"),
        ([[0] * 3, [0] * 2, [0] * 5], "token", r"\(per: token\) returned list .* for sample 0, expected a list of 4 numbers"),
        (
            [[1, 2], [1, 2], [1, 2]],
            "turn",
            r"\(per: turn\) returned list .* for sample 1, expected a list of 1 numbers, one per turn",
        ),
        ([1.0, 1.0, 1.0], "turn", "returned float 1.0 for sample 0, expected a list of 2 numbers"),
        ([[1, 2], [float("nan")], [1, 2]], "turn", "'f, sample 1' returned float nan"),
        ([[1, 1, 1, 1], [0] * 2, [0] * 5], "token", "returned 1 for token 2 of sample 0, which the policy did not sample"),
    ],
)
def test_what_does_not_fit_the_tokens_is_one_clear_line(values, per, message):
    with pytest.raises(UserError, match=message):
        score_batch([pays(values, per)], BATCH)


def test_where_nothing_was_sampled_and_next_to_a_cache_it_is_refused():
    with pytest.raises(UserError, match="'f' has per: turn, which needs sampled tokens"):
        score_batch([pays([[1.0]], "turn")], ScoringBatch(["p"], ["r"]))
    with pytest.raises(ValueError, match="cache: true stores one score per response"):
        RewardFunctionSection(name="f", per="token", cache=True)
