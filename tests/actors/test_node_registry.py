"""An error about an actor says on which node and in which process it was last seen, for as long as that is true."""

from types import SimpleNamespace

from rayrlhf.actors import heartbeat as monitor
from rayrlhf.actors.health import RetryPolicy
from rayrlhf.actors.waiting import describe_location, overrun
from rayrlhf.actors.worker import Beat, ProcessLocation

NAME = "ppo/reward/0"


def test_a_deadline_that_is_over_names_role_rank_process_node_call_and_how_long_it_waited(monkeypatch):
    """Ray is left out: the ping has been answered."""
    answered = SimpleNamespace(
        wait=lambda refs, timeout: (refs, []), get=lambda ref: Beat(ProcessLocation(4711, "node", "10.0.0.7"), [])
    )
    monkeypatch.setattr(monitor, "ray", answered)
    guard = monitor.HeartbeatMonitor(RetryPolicy(ping_deadline=8.0), 1.0)
    guard.add(NAME, "handle")
    assert "reward: no response from ppo/reward/0 within 15 s (called at " in str(overrun("reward", [NAME], 15.0))
    guard._monitored[NAME].ping = "ping"
    guard._check(NAME, guard._monitored[NAME])
    late = str(overrun("reward", [NAME, "ppo/reward/1"], 15.0))
    assert late.startswith(
        "reward: no response from ppo/reward/0 (process 4711 on node 10.0.0.7), ppo/reward/1 within 15 s (called at "
    )
    guard.add(NAME, "another handle")
    assert describe_location(NAME) == NAME
