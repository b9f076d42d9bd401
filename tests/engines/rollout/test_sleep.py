"""A sleeping vLLM engine: what is called of vLLM and when, on its real CPU build, which does all of it but free memory."""

import pytest

from tests.engines.rollout_cases import gap, make_requests, sample, start
from tests.weight_sync.test_buckets import buckets_of, perturbed


@pytest.fixture(scope="module")
def engine():
    started = start("vllm", sleep=True)
    yield started
    started.close()


@pytest.fixture
def calls(engine, monkeypatch):
    """Calls of vLLM in their order, each still made."""
    noted = []

    def note(owner, name):
        original = getattr(owner, name)

        def call(*arguments, **keywords):
            noted.append((name, *(arguments or keywords.values())))
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, call)

    note(engine._engine, "sleep")
    note(engine._engine, "wake_up")
    note(engine.weight_client, "start_weight_update")
    note(engine.weight_client, "finish_weight_update")
    return noted


def test_weights_wake_first_and_the_cache_when_they_are_in_and_then_they_are_what_is_sampled_from(engine, calls):
    sample(engine, make_requests(2))
    engine.sleep()
    engine.sleep()
    assert engine._engine.is_sleeping()
    with pytest.raises(RuntimeError, match="sleeps"):
        engine.submit(make_requests(2), temperature=1.0, max_new_tokens=4)
    network = perturbed(tie=True, seed=3)
    engine.begin_weights(1)
    assert engine._engine.is_sleeping()
    for bucket in buckets_of(network, 2**30):
        engine.receive_weights(bucket)
    engine.finish_weights()
    assert not engine._engine.is_sleeping()
    assert calls == [
        ("sleep", 2),
        ("wake_up", ["weights"]),
        ("start_weight_update",),
        ("finish_weight_update", "1"),
        ("wake_up", ["kv_cache"]),
    ]
    assert gap(network, sample(engine, make_requests(2)).values()) < 5e-5


def test_an_engine_with_unfinished_requests_does_not_sleep(engine, calls):
    engine.submit(make_requests(2), temperature=1.0, max_new_tokens=40)
    with pytest.raises(RuntimeError, match="unfinished"):
        engine.sleep()
    assert calls == []
    while engine.unfinished:
        engine.poll(8)


def test_weights_for_an_engine_that_is_awake_wake_nothing(engine, calls):
    engine.begin_weights(2)
    for bucket in buckets_of(perturbed(tie=True, seed=4), 2**30):
        engine.receive_weights(bucket)
    engine.finish_weights()
    assert [call[0] for call in calls] == ["start_weight_update", "finish_weight_update"]
