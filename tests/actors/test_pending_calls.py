"""A wait is known to others for as long as it lasts, by the name of each actor that still owes an answer."""

import re
import time
from types import SimpleNamespace

import pytest

from rayrlhf.actors import heartbeat as watch
from rayrlhf.actors.health import RetryPolicy
from rayrlhf.actors.node_registry import located, seen
from rayrlhf.actors.pending_calls import asked, waited_for
from rayrlhf.actors.worker import Place


def test_a_wait_is_known_from_its_beginning_to_its_end():
    with asked("policy update", {"run/policy/0": time.monotonic() - 12}):
        assert waited_for("run/policy/0") == "policy update asked 12 s ago"
        assert waited_for("run/policy/1") == ""
    assert waited_for("run/policy/0") == ""


def test_of_several_waits_on_one_actor_the_newest_is_told_and_equal_ones_end_one_by_one():
    since = {"a": time.monotonic()}
    with asked("score", since):
        with asked("score", dict(since)), asked("sync", {"a": time.monotonic() - 3}):
            assert waited_for("a") == "sync asked 3 s ago"
        assert waited_for("a") == "score asked 0 s ago"


def test_who_has_answered_is_waited_for_no_more():
    since = {"a": time.monotonic(), "b": time.monotonic()}
    with asked("generate", since):
        del since["a"]
        assert (waited_for("a"), waited_for("b")) == ("", "generate asked 0 s ago")


def test_a_wait_that_fails_is_over():
    with pytest.raises(ValueError, match="no"), asked("generate", {"a": 0.0}):
        raise ValueError("no")
    assert waited_for("a") == ""


def test_the_line_about_a_hanging_process_names_role_rank_process_node_call_and_how_long_it_waited(monkeypatch):
    """Ray is left out: it would not let a ping be as old as this."""
    killed, lines = [], []
    monkeypatch.setattr(watch, "ray", SimpleNamespace(wait=lambda refs, timeout: ([], refs), kill=killed.append))
    guard = watch.Watch(RetryPolicy(ping_deadline=8.0), 1.0, lambda name, line: lines.append((name, line)))
    actor = watch._Watched("handle", ping="ping", sent=time.monotonic() - 9)
    seen("ppo/rollout/1", Place(4711, "node", "10.0.0.7"))
    with asked("generate", {"ppo/rollout/1": time.monotonic() - 11}):
        guard._look_at("ppo/rollout/1", actor)
    assert killed == ["handle"]
    ((name, line),) = lines
    assert name == "ppo/rollout/1"
    expected = (
        r"ppo/rollout/1 \(process 4711 on node 10\.0\.0\.7\): no answer to a ping for 9 s; "
        r"the run waits for generate asked 11 s ago; the process is ended"
    )
    assert re.fullmatch(expected, line)
    assert located("ppo/rollout/1") == "ppo/rollout/1"
