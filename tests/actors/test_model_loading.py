"""Processes that are lost while models load: replaced, a bounded number of times."""

from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError

from rayrlhf.actors import model_loading
from rayrlhf.actors.health import RetryPolicy
from rayrlhf.actors.model_loading import load_models
from rayrlhf.errors import ActorLostError

NAMES = {"policy": ("run/policy/0", "run/policy/1"), "rollout": ("run/rollout/0",)}
RETRY = RetryPolicy(attempts=2, backoff=0.0)


class Groups:
    """Actor groups whose loads fail as scripted: name -> the outcomes of its loads, one after another."""

    def __init__(self, monkeypatch, **outcomes):
        self.outcomes = {f"run/{name}": list(each) for name, each in outcomes.items()}
        self.workers = self.groups = NAMES
        self.started = []
        self.lost = None
        self.replaced = []
        self.checks = []
        monkeypatch.setattr(model_loading, "building_order", lambda workers: [list(workers)])
        monkeypatch.setattr(model_loading, "wait_any", lambda calls, *_: sorted(calls)[-1])
        monkeypatch.setattr(model_loading, "fetch", self.fetch)

    def __getitem__(self, role):
        return SimpleNamespace(names=NAMES[role], handles=NAMES[role], find_lost=lambda: self.lost)

    def build_gang(self, role, seconds):
        self.started.append(role)
        return dict.fromkeys(NAMES[role])

    def build_rank(self, role, rank):
        self.started.append(role)

    def replace(self, role, ranks):
        self.replaced += [f"{role}/{rank}" for rank in ranks]

    def load_checks(self, roles, seconds):
        if self.checks:
            raise self.checks.pop(0)
        return dict.fromkeys(roles, "checked")

    def fetch(self, call, what, name):
        left = self.outcomes.get(name)
        if left:
            raise left.pop(0)


def gone(name):
    return ActorLostError(f"run/{name} was lost", f"run/{name}")


def test_a_lost_process_is_loaded_again_and_one_of_a_group_with_its_group(monkeypatch):
    lines = []
    groups = Groups(monkeypatch, **{"rollout/0": [gone("rollout/0")], "policy/1": [gone("policy/1")]})
    load_models(groups, 9.0, RETRY, lambda *event: lines.append(event[:2]))
    assert groups.started == ["policy", "rollout", "rollout", "policy"]
    assert groups.replaced == ["rollout/0", "policy/0", "policy/1"]
    assert lines == [
        (event, f"run/{name}/{rank}") for name, rank in (("rollout", 0), ("policy", 1)) for event in ("lost", "recovered")
    ]


def test_a_process_that_dies_at_every_load_ends_the_run(monkeypatch):
    groups = Groups(monkeypatch, **{"rollout/0": [gone("rollout/0")] * 9})
    with pytest.raises(ActorLostError, match="given up after 2 rebuilds in a row"):
        load_models(groups, 9.0, RETRY)
    assert groups.started == ["policy", "rollout", "rollout", "rollout"]
    with pytest.raises(ActorLostError, match=r"run/rollout/0 was lost$"):
        load_models(groups, 9.0)


def test_the_rank_that_is_gone_is_named_and_not_the_one_that_failed_for_it(monkeypatch):
    lines = []
    groups = Groups(monkeypatch, **{"policy/1": [RayTaskError("build", "connection reset", None)] * 2})
    groups.lost = "run/policy/0"
    load_models(groups, 9.0, RETRY, lambda *event: lines.append(event[:2]))
    assert lines[0] == ("lost", "run/policy/0")
    groups = Groups(monkeypatch, **{"policy/1": [RayTaskError("build", "a bug", None)]})
    with pytest.raises(RayTaskError):
        load_models(groups, 9.0, RETRY)


def test_a_process_that_dies_once_it_has_its_model_is_loaded_again(monkeypatch):
    groups = Groups(monkeypatch)
    groups.checks = [gone("policy/0"), gone("rollout/0")]
    assert load_models(groups, 9.0, RETRY) == {"policy": "checked", "rollout": "checked"}
    assert groups.started == ["policy", "rollout", "policy", "rollout"]
