"""A wait is known to others for as long as it lasts, by the name of each actor that still owes an answer."""

import re
import time
from types import SimpleNamespace

import pytest

from rayrlhf.actors import heartbeat as monitor
from rayrlhf.actors.health import RetryPolicy
from rayrlhf.actors.waiting import describe_location, pending_call, record_location, track_calls
from rayrlhf.actors.worker import ProcessLocation


def test_a_wait_is_known_from_its_beginning_to_its_end():
    with track_calls("policy update", {"run/policy/0": time.monotonic() - 12}):
        assert pending_call("run/policy/0") == "policy update called 12 s ago"
        assert pending_call("run/policy/1") == ""
    assert pending_call("run/policy/0") == ""


def test_of_several_waits_on_one_actor_the_newest_is_told_and_equal_ones_end_one_by_one():
    since = {"a": time.monotonic()}
    with track_calls("score", since):
        with track_calls("score", dict(since)), track_calls("sync", {"a": time.monotonic() - 3}):
            assert pending_call("a") == "sync called 3 s ago"
        assert pending_call("a") == "score called 0 s ago"


def test_who_has_answered_is_waited_for_no_more():
    since = {"a": time.monotonic(), "b": time.monotonic()}
    with track_calls("generate", since):
        del since["a"]
        assert (pending_call("a"), pending_call("b")) == ("", "generate called 0 s ago")


def test_a_wait_that_fails_is_over():
    with pytest.raises(ValueError, match="no"), track_calls("generate", {"a": 0.0}):
        raise ValueError("no")
    assert pending_call("a") == ""


def test_the_line_about_a_hanging_process_names_role_rank_process_node_call_and_how_long_it_waited(monkeypatch):
    """Ray is left out: it would not let a ping be as old as this."""
    killed, lines = [], []
    monkeypatch.setattr(monitor, "ray", SimpleNamespace(wait=lambda refs, timeout: ([], refs), kill=killed.append))
    retry = RetryPolicy(ping_deadline=8.0)
    guard = monitor.HeartbeatMonitor(retry, 1.0, lambda event, name, line, _: lines.append((name, line)))
    actor = monitor._Monitored("handle", retry, ping="ping", sent=time.monotonic() - 9)
    record_location("ppo/rollout/1", ProcessLocation(4711, "node", "10.0.0.7"))
    with track_calls("generate", {"ppo/rollout/1": time.monotonic() - 11}):
        guard._check("ppo/rollout/1", actor)
    assert killed == ["handle"]
    ((name, line),) = lines
    assert name == "ppo/rollout/1"
    expected = (
        r"ppo/rollout/1 \(process 4711 on node 10\.0\.0\.7\): no response to a ping for 9 s; "
        r"the run waits for generate called 11 s ago; the process is killed"
    )
    assert re.fullmatch(expected, line)
    assert describe_location("ppo/rollout/1") == "ppo/rollout/1"
