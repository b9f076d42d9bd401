"""A run that waits for CPUs says what it waits for and which run holds them."""

import pytest
import ray

from rayrlhf.actors.actor_groups import _await_placement_groups
from rayrlhf.actors.placement import GroupPlan, ResourcePlan
from rayrlhf.errors import UserError


class Granted:
    """A placement group that is granted after some waits."""

    def __init__(self, after):
        self.left = after

    def wait(self, seconds):
        self.left -= 1
        return self.left < 0


PLAN = ResourcePlan({"colocated": GroupPlan("PACK", ({"CPU": 2.0},))}, {}, False)


@pytest.fixture(autouse=True)
def busy_cluster(monkeypatch):
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.5})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    names = ["first/policy/0", "first/rollout/0"]
    monkeypatch.setattr(ray.util, "list_named_actors", lambda all_namespaces: [{"name": name} for name in names])


def test_nothing_is_said_where_nothing_is_waited_for():
    lines = []
    _await_placement_groups({"colocated": Granted(0)}, PLAN, 60.0, lines.append)
    assert lines == []


def test_the_wait_names_the_request_what_is_free_and_the_holder_once():
    lines = []
    _await_placement_groups({"colocated": Granted(3)}, PLAN, 60.0, lines.append)
    assert lines == ["waiting up to 60 s for 2 CPUs, of 2 are 0.5 free; held by run first"]


def test_the_end_of_the_wait_is_one_line_without_internals():
    with pytest.raises(UserError) as caught:
        _await_placement_groups({"colocated": Granted(10**9)}, PLAN, 0.01, lambda line: None)
    assert str(caught.value) == (
        "1 x (2 CPUs) not granted within 0 s (placement.wait_seconds): 2 CPUs, of 2 are 0.5 free; held by run first"
    )
