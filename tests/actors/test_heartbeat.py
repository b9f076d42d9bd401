"""A process that is stopped but alive is named after a while, and killed after a bound."""

from types import SimpleNamespace

import pytest

from rayrlhf.actors import heartbeat
from rayrlhf.actors.actor_restarter import ActorRestarter
from rayrlhf.actors.health import RetryPolicy
from rayrlhf.actors.heartbeat import HeartbeatMonitor
from rayrlhf.actors.model_loading import load_models
from rayrlhf.actors.replica_pool import ReplicaPool
from tests.actors.test_model_loading import RETRY, Groups, gone


@pytest.fixture
def clock(monkeypatch):
    """The time, and an actor that never responds."""
    now = SimpleNamespace(time=100.0, killed=[])
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now.time)
    monkeypatch.setattr(heartbeat, "remote_call", lambda *_: "ping")
    monkeypatch.setattr(heartbeat.ray, "wait", lambda *_, **__: ([], []))
    monkeypatch.setattr(heartbeat.ray, "kill", now.killed.append)
    return now


def silence(monitor, clock, seconds):
    """Let seconds pass, one at a time."""
    for _ in range(seconds):
        clock.time += 1.0
        for name, actor in dict(monitor._monitored).items():
            monitor._check(name, actor)


def test_a_silent_process_is_named_once_and_then_killed(clock):
    events = []
    monitor = HeartbeatMonitor(RetryPolicy(ping_deadline=30.0), 5.0, lambda *event: events.append(event[:3]))
    monitor.add("run/rollout/0", "handle", loading_seconds=600.0)
    silence(monitor, clock, 29)
    assert events == []
    silence(monitor, clock, 200)
    (named,) = events
    assert named[:2] == ("silent", "run/rollout/0")
    assert "it counts as lost after 300 s" in named[2]
    assert clock.killed == []
    silence(monitor, clock, 75)
    assert [event[0] for event in events] == ["silent", "hung"]
    assert clock.killed == ["handle"]
    silence(monitor, clock, 300)
    assert len(events) == 2


def test_a_running_process_has_its_own_shorter_bound(clock):
    events = []
    monitor = HeartbeatMonitor(RetryPolicy(ping_deadline=30.0), 5.0, lambda *event: events.append(event[:2]))
    monitor.add("run/reward/0", "handle")
    silence(monitor, clock, 33)
    assert events == [("hung", "run/reward/0")]
    assert clock.killed == ["handle"]


class Watch:
    """A monitor that keeps which processes it was given, and the deadlines of their loads."""

    def __init__(self):
        self.calls = []

    def add(self, name, handle, loading_seconds=0.0):
        self.calls.append((name, loading_seconds))

    def remove(self, name):
        self.calls.append((name, None))


def test_every_process_that_loads_is_watched_and_so_is_its_replacement(monkeypatch):
    groups, watch = Groups(monkeypatch, **{"rollout/0": [gone("rollout/0")]}), Watch()
    load_models(groups, 9.0, RETRY, monitor=watch)
    loading = [("run/policy/0", 9.0), ("run/policy/1", 9.0), ("run/rollout/0", 9.0), ("run/rollout/0", 9.0)]
    assert watch.calls == loading


class Rebuilding:
    """Actor groups of one group, whose processes can be restarted."""

    def __init__(self, group):
        self.group = group

    def __contains__(self, role):
        return True

    def __getitem__(self, role):
        return self.group

    def restart(self, role, rank):
        return "building"


def test_a_stateless_process_is_watched_while_it_is_rebuilt_and_again_if_it_stops_then(monkeypatch):
    waits = [gone("reward/0")]

    def wait(*_):
        if waits:
            raise waits.pop()

    monkeypatch.setattr("rayrlhf.actors.actor_restarter.wait_all", wait)
    group = SimpleNamespace(names=("run/reward/0",), handles=("old",))
    groups = Rebuilding(group)
    watch = Watch()
    ActorRestarter(groups, RETRY, 60.0, watch).restart_lost("reward", 0, "old", gone("reward/0"))
    assert watch.calls == [("run/reward/0", seconds) for seconds in (None, 60.0, 60.0, 0.0)]


def test_a_replica_is_watched_while_it_is_rebuilt(monkeypatch):
    group = SimpleNamespace(names=("run/rollout/0",), handles=("old",))
    groups = Rebuilding(group)
    monkeypatch.setattr("rayrlhf.actors.replica_pool.ray.kill", lambda _: None)
    monkeypatch.setattr("rayrlhf.actors.replica_pool.ray.wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr("rayrlhf.actors.replica_pool.fetch", lambda *_: None)
    watch = Watch()
    pool = ReplicaPool(groups, RETRY, watch, build_seconds=60.0)
    pool.lost(pool.replicas[0], gone("rollout/0"))
    pool.poll_rebuilds()
    assert [replica.health.state for replica in pool.replicas] == ["stale"]
    assert watch.calls == [("run/rollout/0", seconds) for seconds in (None, 60.0, 0.0)]


def test_the_stacks_of_a_hung_process_are_kept_before_it_is_killed(clock, monkeypatch):
    kept = []
    monkeypatch.setattr(heartbeat, "_outside", lambda actor: "Thread MainThread")
    monitor = HeartbeatMonitor(
        RetryPolicy(ping_deadline=30.0),
        5.0,
        lambda *line: None,
        on_stacks=lambda *found: kept.append((*found, list(clock.killed))),
    )
    monitor.add("run/rollout/0", "handle")
    silence(monitor, clock, 40)
    assert kept == [("run/rollout/0", "Thread MainThread", [])]
    assert clock.killed == ["handle"]
