"""Requests and their way to replicas are pure functions; the streaming itself is tested with real actors in test_run.py."""

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.actors.health import Health
from rayrlhf.data.records import Prompt
from rayrlhf.errors import ActorLostError, AlarmError, DeadlineError
from rayrlhf.ppo import generation as module
from rayrlhf.ppo.generation import Generation
from rayrlhf.ppo.request_queue import assign
from rayrlhf.ppo.rollout_collector import make_requests


def prompts(*ids):
    return [Prompt(number, str(number), np.array([number], dtype=np.int32)) for number in ids]


def test_a_prompt_that_occurs_twice_in_a_step_gets_samples_of_its_own_each_time():
    keys = [request.key for request in make_requests(prompts(5, 6, 5), 2, step=3, run_seed=0)]
    assert len(set(keys)) == 6
    assert [key.sample for key in keys if key.prompt == 5] == [0, 1, 2, 3]


def test_a_retried_request_asks_for_the_same_thing_and_another_step_for_another():
    first, again, later = (make_requests(prompts(1, 2), 2, step=step, run_seed=7) for step in (0, 0, 1))
    assert [request.seed for request in first] == [request.seed for request in again]
    assert len({request.seed for request in (*first, *later)}) == 8


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40, unique=True), st.integers(1, 4), st.integers(1, 5))
def test_every_request_is_assigned_once_and_a_prompt_stays_on_one_replica(ids, samples, replicas):
    requests = make_requests(prompts(*ids), samples, step=0, run_seed=0)
    shares = assign(requests, replicas)
    assert sorted(request.key for share in shares for request in share) == sorted(request.key for request in requests)
    homes = {}
    for index, share in enumerate(shares):
        for request in share:
            assert homes.setdefault(request.key.prompt, index) == index
    assert max(map(len, shares)) - min(map(len, shares)) <= samples


def test_a_request_that_is_on_its_way_cannot_be_asked_for_twice():
    pool = SimpleNamespace(replicas=[None])
    generation = Generation(pool, lambda _: None, max_new_tokens=4, seconds=1.0)
    generation.add(make_requests(prompts(1, 2), 1, step=3, run_seed=0), temperature=1.0)
    generation.add(make_requests(prompts(1, 2), 1, step=4, run_seed=0), temperature=1.0)
    with pytest.raises(ValueError, match="in flight already"):
        generation.add(make_requests(prompts(2), 1, step=3, run_seed=0), temperature=0.0)


def test_a_sample_that_gets_lost_between_queue_and_batch_is_named_at_once_and_not_waited_for():
    generation = Generation(SimpleNamespace(replicas=[None]), lambda _: None, max_new_tokens=4, seconds=60.0)
    requests = make_requests(prompts(1, 2), 1, step=3, run_seed=0)
    batch = generation.add(requests, temperature=1.0)
    generation._queue.finished(SimpleNamespace(key=request.key) for request in requests)
    batch.missing.discard(requests[0].key)
    with pytest.raises(AlarmError, match="step 4: sample 0 of prompt 2 was issued and got lost while it was sampled"):
        list(generation.collect(batch))


Finished = namedtuple("Finished", "key")


class LateReplica:
    """Finishes nothing until it has been replaced, in polls of a second; its pool and its calls, which return at once."""

    rank, name, stale, building, losses = 0, "ppo/rollout/0", (), {}, 0

    def __init__(self, monkeypatch, *, rebuilt):
        monkeypatch.setattr(module, "ray", SimpleNamespace(wait=lambda refs, **_: (refs, [])))
        monkeypatch.setattr(module, "fetch", lambda result, *_: result)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.seconds))
        self.rebuilt, self.killed, self.requests, self.handle, self.health = rebuilt, 0, [], object(), Health()
        self.replicas, self.seconds = [self], 0

    @property
    def serving(self):
        return self.replicas if self.health.serves else []

    def poll_rebuilds(self):
        if not self.health.serves:
            self.health, self.handle, self.requests = Health(), object(), []

    def lost(self, replica, error):
        if not self.rebuilt:
            raise error
        self.health, self.killed = Health("down"), self.killed + 1

    def submit(self, requests, *_):
        self.requests += requests

    def poll(self, minimum, seconds):
        self.seconds += 1
        assert self.seconds < 100, "waited on and on"
        finished = self.requests if self.killed else []
        return tuple(Finished(request.key) for request in finished), len(self.requests) - len(finished)

    def collected(self):
        generation = Generation(self, lambda _: None, max_new_tokens=4, seconds=10, poll_seconds=1.0)
        batch = generation.add(make_requests(prompts(1, 2), 1, step=3, run_seed=0), temperature=1.0)
        return [rollout for finished in generation.collect(batch) for rollout in finished]


def test_polls_that_bring_no_response_do_not_put_off_the_deadline(monkeypatch):
    """Where weights change under way, a poll ends every half second."""
    with pytest.raises(DeadlineError, match="generate: no response from ppo/rollout/0"):
        LateReplica(monkeypatch, rebuilt=False).collected()


def test_the_wait_begins_again_when_a_late_replica_is_replaced(monkeypatch):
    replica = LateReplica(monkeypatch, rebuilt=True)
    assert len(replica.collected()) == 2
    assert replica.killed == 1


class Forgetful(LateReplica):
    """Finishes one of its requests in each poll; its first process has forgotten all others by then."""

    def poll(self, minimum, seconds):
        self.seconds += 1
        assert self.seconds < 10, "waited on and on"
        done, self.requests = self.requests[:1], self.requests[1:] if self.killed else []
        return tuple(Finished(request.key) for request in done), len(self.requests)


@pytest.mark.parametrize("rebuilt", [True, False])
def test_a_replica_that_has_forgotten_requests_is_lost_at_once_and_keeps_what_it_finished(monkeypatch, rebuilt):
    replica = Forgetful(monkeypatch, rebuilt=rebuilt)
    if rebuilt:
        assert sorted(rollout.key.prompt for rollout in replica.collected()) == [1, 2]
        assert (replica.killed, replica.seconds) == (1, 2)
    else:
        with pytest.raises(ActorLostError, match=r"^ppo/rollout/0 has forgotten 1 of 2 requests$"):
            replica.collected()


Sampled = namedtuple("Sampled", ("key", "response_ids"))


class HalfDone(LateReplica):
    """Finishes its first request with three tokens; has sampled five of the second when it is canceled."""

    def __init__(self, monkeypatch, *, lives=True):
        super().__init__(monkeypatch, rebuilt=False)
        self.lives, self.canceled = lives, 0
        monkeypatch.setattr(module, "fetch", self.fetched)

    def fetched(self, result, *_):
        if result == "canceled":
            self.canceled += 1
            if not self.lives:
                raise ActorLostError("gone", self.name)
            return 5
        return result

    def poll(self, minimum, seconds):
        done, self.requests = self.requests[:1], self.requests[1:]
        return tuple(Sampled(request.key, (1, 2, 3)) for request in done), len(self.requests)

    def cancel(self):
        return "canceled"


@pytest.mark.parametrize(("lives", "tokens"), [(True, 8), (False, 3)])
def test_a_reset_counts_the_tokens_that_were_sampled_in_vain(monkeypatch, lives, tokens):
    replica = HalfDone(monkeypatch, lives=lives)
    generation = Generation(replica, lambda _: None, max_new_tokens=8, seconds=10, poll_seconds=1.0)
    batch = generation.add(make_requests(prompts(1, 2, 3), 1, step=3, run_seed=0), temperature=1.0)
    assert [one.key.prompt for one in next(generation.collect(batch))] == [1]
    generation._dispatch()  # a second poll is under way, whose response comes too late
    assert generation.reset() == tokens
    assert replica.canceled == 1
    assert generation.vitals() == {"open": 0, "in_flight": {}}
    generation.add(make_requests(prompts(1, 2), 1, step=3, run_seed=0), temperature=1.0)
