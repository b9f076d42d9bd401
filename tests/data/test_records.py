"""Records travel as columns and arrive as they were."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.records import Prompt, Records, Rollout, SampleKey, TokenScores, TokenSequence


def rollout(number, length):
    ids = np.arange(length, dtype=np.int32) + number
    return Rollout(
        SampleKey(3, number, 1),
        ids[: number % 3],
        ids,
        ids % 2 == 0,
        ids.astype(np.float32) / 7,
        ids * 0,
        "stop" if number % 2 else "length",
        f"text {number} \N{SNOWMAN}",
        2**63 - number,
    )


def same(one, other):
    for name in type(one).__slots__:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert type(mine) is type(theirs)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)
        else:
            assert mine == theirs
    return True


@given(st.lists(st.integers(0, 9), max_size=12))
def test_a_list_of_rollouts_arrives_as_it_was_left_empty_arrays_included(lengths):
    sent = Records(rollout(number, length) for number, length in enumerate(lengths))
    arrived = pickle.loads(pickle.dumps(sent, protocol=5))
    assert isinstance(arrived, Records)
    assert len(arrived) == len(sent)
    assert all(map(same, sent, arrived))


def test_fields_that_are_none_or_only_sometimes_there_arrive_too():
    some = np.ones(2, np.float32)
    sent = Records([TokenScores(some, None, some), TokenScores(some * 2, None, None), TokenScores(hidden=np.ones((2, 3)))])
    arrived = pickle.loads(pickle.dumps(sent))
    assert all(map(same, sent, arrived))


def test_other_values_of_a_record_travel_as_they_are():
    sent = Records([Prompt(4, "say", np.array([1], np.int32), {"answer": [1, {"x": "y"}]})])
    assert all(map(same, sent, pickle.loads(pickle.dumps(sent))))


def test_a_single_record_is_pickled_whole_and_stays_frozen():
    arrived = pickle.loads(pickle.dumps(TokenSequence(np.arange(3, dtype=np.int32), 1)))
    assert arrived.response_length == 2
    with pytest.raises(AttributeError):
        arrived.prompt_length = 2


def test_a_message_has_few_buffers_however_many_rollouts_it_holds():
    buffers = []
    pickle.dumps(Records(rollout(number, 5) for number in range(100)), protocol=5, buffer_callback=buffers.append)
    assert len(buffers) <= 2 * 5
