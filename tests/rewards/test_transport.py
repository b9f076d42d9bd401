"""The circuit breaker and the choice among servers, by a clock of the test's own."""

import pytest

from rayrlhf.rewards.transport import Breaker, choose


def failed(breaker: Breaker, *times: float) -> Breaker:
    for now in times:
        breaker.begin()
        breaker.fail(now)
    return breaker


@pytest.mark.parametrize(
    ("failures", "now", "admits"),
    [([], 0, True), ([1, 2], 2, True), ([1, 2, 3], 3, False), ([1, 2, 3], 12.9, False), ([1, 2, 3], 13, True)],
)
def test_it_opens_after_three_failures_in_a_row_and_half_opens_ten_seconds_later(failures, now, admits):
    assert failed(Breaker(), *failures).admits(now) is admits


def test_half_open_lets_one_call_through_and_its_end_decides():
    breaker = failed(Breaker(), 1, 2, 3)
    breaker.begin()
    assert not breaker.admits(20)
    breaker.fail(20)
    assert not breaker.admits(29)
    assert breaker.admits(30)
    breaker.begin()
    breaker.succeed()
    assert breaker.admits(30)
    assert failed(breaker, 31, 32).admits(32)


def test_a_success_between_failures_starts_the_count_again_and_a_cancelled_call_says_nothing():
    breaker = failed(Breaker(), 1, 2)
    breaker.begin()
    breaker.succeed()
    assert failed(breaker, 3, 4).admits(4)
    breaker.begin()
    breaker.abandon()
    assert (breaker.failures, breaker.in_flight) == (2, 0)


def test_the_least_busy_server_is_asked_and_an_open_one_never():
    servers = [Breaker(in_flight=2), Breaker(in_flight=1, started=5), Breaker(in_flight=1, started=4)]
    assert choose(servers, 0) == 2
    failed(servers[2], 1, 2, 3)
    assert choose(servers, 4) == 1
    assert choose([failed(Breaker(), 1, 2, 3)], 4) is None
