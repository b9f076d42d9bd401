"""An actor counts its calls under its own name, also those that fail, and a class used without Ray counts nowhere."""

import pytest

from rayrlhf.actors.actor_metrics import BUSY, CALLS, MEMORY, TOKENS, UNFINISHED, ActorMetrics, measured


class Recorded:
    def __init__(self):
        self.record_location = []

    def inc(self, value=1.0, tags=None):
        self.record_location.append((value, tags))

    set = inc


def recorded(name):
    metrics = ActorMetrics(name)
    metrics._counters = {key: Recorded() for key in (CALLS, BUSY, TOKENS)}
    metrics._gauges = {key: Recorded() for key in (MEMORY, UNFINISHED)}
    return metrics


class Working:
    def __init__(self, metrics):
        self.actor_metrics = metrics

    @measured
    def divide(self, number, by=1):
        return number / by


def test_calls_are_counted_with_their_time_under_run_role_and_rank():
    metrics = recorded("team/run/policy/3")
    assert Working(metrics).divide(6, by=3) == 2
    tags = {"run": "team/run", "role": "policy", "rank": "3", "call": "divide"}
    assert metrics._counters[CALLS].record_location == [(1.0, tags)]
    ((seconds, labelled),) = metrics._counters[BUSY].record_location
    assert seconds > 0
    assert labelled == tags


def test_a_call_that_fails_is_counted_and_its_error_goes_on():
    metrics = recorded("run/policy/0")
    with pytest.raises(ZeroDivisionError):
        Working(metrics).divide(1, by=0)
    assert len(metrics._counters[CALLS].record_location) == 1


def test_a_replica_shows_its_tokens_and_what_it_has_not_finished():
    metrics = recorded("run/rollout/1")
    metrics.sampled(64, 3)
    metrics.sampled(0, 0)
    metrics.peak_memory(2**30)
    tags = {"run": "run", "role": "rollout", "rank": "1"}
    assert metrics._counters[TOKENS].record_location == [(64, tags)]
    assert metrics._gauges[UNFINISHED].record_location == [(3, tags), (0, tags)]
    assert metrics._gauges[MEMORY].record_location == [(2**30, tags)]


@pytest.mark.parametrize("name", ["", "somebody", "two/parts"])
def test_without_an_actors_name_nothing_is_counted(name):
    metrics = recorded(name)
    Working(metrics).divide(1)
    metrics.sampled(5, 1)
    metrics.peak_memory(1)
    assert all(not recorder.record_location for recorder in (*metrics._counters.values(), *metrics._gauges.values()))


def test_the_signature_that_ray_reads_is_that_of_the_method():
    import inspect

    assert list(inspect.signature(Working.divide).parameters) == ["self", "number", "by"]
