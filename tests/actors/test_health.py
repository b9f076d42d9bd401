"""The state machine of a process, as a table: state and event in, state out."""

import pytest

from rayrlhf.actors.health import Built, Health, Lost, Pong, RetryPolicy, Silent, Started, StepCompleted, Synced, advance

POLICY = RetryPolicy(attempts=3, backoff=2.0, ping_deadline=30.0)
STATES = ("healthy", "suspect", "down", "rebuilding", "stale", "abandoned")

MOVES = [
    ("healthy", Silent(6), "suspect"),
    ("healthy", Silent(30), "down"),
    ("healthy", Lost("gone"), "down"),
    ("suspect", Pong(), "healthy"),
    ("suspect", Silent(29), "suspect"),
    ("suspect", Silent(31), "down"),
    ("suspect", Lost("gone"), "down"),
    ("down", Started(), "rebuilding"),
    ("rebuilding", Built(), "stale"),
    ("rebuilding", Built(current=True), "healthy"),
    ("rebuilding", Lost("gone"), "down"),
    ("stale", Synced(), "healthy"),
    ("stale", Silent(31), "down"),
    ("stale", Lost("gone"), "down"),
]
EVENTS = (Pong(), Silent(6), Silent(31), Lost("gone"), Started(), Built(), Built(current=True), Synced(), StepCompleted())


@pytest.mark.parametrize(("state", "event", "after"), MOVES)
def test_the_moves_that_make_sense(state, event, after):
    assert advance(Health(state), event, 10.0, POLICY).state == after


def test_every_other_event_leaves_the_state_as_it_is():
    moving = {(state, type(event), getattr(event, "seconds", None)) for state, event, _ in MOVES}
    for state in STATES:
        for event in EVENTS:
            seconds = getattr(event, "seconds", None)
            if (state, type(event), seconds) in moving or (state, type(event)) in {("healthy", Silent), ("suspect", Silent)}:
                continue
            if (state, type(event)) == ("stale", Silent) and seconds >= POLICY.ping_deadline:
                continue
            assert advance(Health(state), event, 10.0, POLICY).state == state, (state, event)


def test_only_healthy_and_suspect_processes_get_work():
    assert [state for state in STATES if Health(state).serves] == ["healthy", "suspect"]


def test_a_rebuilt_process_serves_nothing_before_it_has_the_current_weights():
    health = Health("down")
    for event, serves in ((Started(), False), (Built(), False), (Pong(), False), (Synced(), True)):
        health = advance(health, event, 0.0, POLICY)
        assert health.serves is serves


def test_the_first_rebuild_is_at_once_and_later_ones_wait_twice_as_long_each_time():
    health, waits = Health(), []
    for now in (0.0, 100.0, 200.0):
        health = advance(health, Lost("gone"), now, POLICY)
        waits.append(health.retry_at - now)
        assert health.is_due(health.retry_at)
        assert not health.is_due(health.retry_at - 0.1)
        health = advance(health, Started(), now, POLICY)
    assert waits == [0.0, 2.0, 4.0]


def test_a_process_lost_too_often_in_a_row_is_abandoned_with_the_last_reason():
    health = Health()
    for reason in ("first", "second", "third", "fourth"):
        health = advance(advance(health, Lost(reason), 0.0, POLICY), Started(), 0.0, POLICY)
    assert health.state == "abandoned"
    assert health.reason == "fourth"
    assert not health.is_due(1e9)


def test_a_settled_step_makes_earlier_rebuilds_not_count():
    health = Health()
    for _ in range(20):
        for event in (Lost("gone"), Started(), Built(current=True), StepCompleted()):
            health = advance(health, event, 0.0, POLICY)
    assert health.state == "healthy"


def test_the_longest_wait_is_a_minute():
    assert RetryPolicy(attempts=99, backoff=1.0).delay(50) == 60.0
