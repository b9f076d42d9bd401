"""The books of a step under losses: every request gets exactly one rollout, whatever happens in between."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.records import Rollout, RolloutRequest, SampleKey
from rayrlhf.ppo.request_queue import RequestQueue


def requests(count):
    return [RolloutRequest(SampleKey(3, index // 2, index % 2), np.array([1], np.int32), index) for index in range(count)]


def rollout(request):
    one = np.ones(1, np.int32)
    return Rollout(
        request.key, request.prompt_ids, one, one.astype(bool), one.astype(np.float32), one, "stop", "", request.seed
    )


def test_a_lost_replicas_open_requests_go_to_the_others_and_its_finished_ones_do_not():
    queue = RequestQueue(requests(8), 2, sticky=False)
    given = queue.dispatch([0, 1])
    assert len(given[0]) == len(given[1]) == 4
    queue.finished([rollout(request) for request in given[0][:1]])
    assert queue.lost(0) == 3
    assert not queue.in_flight(0)
    assert [request.key for request in queue.dispatch([1])[1]] == [request.key for request in given[0][1:]]


def test_a_late_duplicate_is_dropped():
    queue = RequestQueue(requests(2), 1, sticky=False)
    share = queue.dispatch([0])[0]
    assert len(queue.finished([rollout(share[0])])) == 1
    assert queue.finished([rollout(share[0])]) == []
    assert [fresh.key for fresh in queue.finished([rollout(share[0]), rollout(share[1])])] == [share[1].key]
    assert queue.done


def test_a_sticky_share_waits_for_its_rank_and_is_sampled_as_a_whole_again():
    queue = RequestQueue(requests(8), 2, sticky=True)
    given = queue.dispatch([0, 1])
    queue.finished([rollout(request) for request in given[0][:3]])
    assert queue.lost(0) == 1
    assert queue.dispatch([1]) == {}
    assert queue.dispatch([0, 1]) == {0: given[0]}


def test_the_share_of_a_rank_that_will_not_come_back_goes_to_the_others():
    queue = RequestQueue(requests(8), 2, sticky=True)
    queue.dispatch([0, 1])
    queue.lost(0)
    queue.release(0)
    assert len(queue.dispatch([1])[1]) == 4


def test_with_no_replica_that_serves_nothing_is_handed_out_and_nothing_is_forgotten():
    queue = RequestQueue(requests(4), 2, sticky=False)
    assert queue.dispatch([]) == {}
    assert sum(len(share) for share in queue.dispatch([1]).values()) == 4


@given(st.data(), st.booleans(), st.integers(1, 12), st.integers(1, 3))
def test_under_any_sequence_of_losses_every_request_is_answered_exactly_once(data, sticky, count, ranks):
    queue = RequestQueue(requests(count), ranks, sticky=sticky)
    queues = {rank: [] for rank in range(ranks)}
    taken = []
    for _ in range(200):
        if queue.done:
            break
        for rank, share in queue.dispatch(range(ranks)).items():
            queues[rank] += share
        rank = data.draw(st.integers(0, ranks - 1))
        if queues[rank] and data.draw(st.integers(0, 4)):
            finished = [queues[rank].pop(0) for _ in range(min(2, len(queues[rank])))]
            taken += [fresh.key for fresh in queue.finished(rollout(request) for request in finished)]
        elif data.draw(st.booleans()):
            queues[rank].clear()
            queue.lost(rank)
    while not queue.done:
        for rank, share in queue.dispatch(range(ranks)).items():
            queues[rank] += share
        for share in queues.values():
            taken += [fresh.key for fresh in queue.finished(rollout(request) for request in share)]
            share.clear()
    assert sorted(taken) == sorted(request.key for request in requests(count))


def of_step(step, count):
    return [RolloutRequest(SampleKey(step, 10 * step + index, 0), np.array([1], np.int32), index) for index in range(count)]


def test_requests_of_later_steps_can_be_added_and_what_was_taken_back_of_earlier_ones_goes_first():
    queue = RequestQueue(of_step(1, 4), 2, sticky=False)
    queue.dispatch([0, 1])
    queue.add(of_step(2, 4))
    assert queue.ranks == [0, 1]
    assert queue.lost(0) == 2
    assert [request.key.step for request in queue.dispatch([1])[1]] == [1, 1, 2, 2, 2, 2]
    assert queue.ranks == [1]


def test_shares_that_belong_to_their_ranks_do_not_grow():
    with pytest.raises(ValueError, match="cannot be added"):
        RequestQueue(of_step(1, 4), 2, sticky=True).add(of_step(2, 4))
