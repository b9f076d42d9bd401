"""Calls reach the actor's method of the same name, and Ray sees the options of decorated methods."""

from types import SimpleNamespace

from rayrlhf.actors.actor_groups import ACTOR_CLASSES
from rayrlhf.actors.remote import remote_call, remote_stream
from rayrlhf.actors.role_groups import GROUP_CLASSES, PolicyGroup, ReferenceGroup, RewardGroup
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.actors.train_actor import TrainActor
from rayrlhf.actors.worker import Worker


class Handle:
    """Records calls as (rank, method, arguments)."""

    def __init__(self, rank, calls):
        self.rank, self.calls = rank, calls

    def __getattr__(self, method):
        return SimpleNamespace(remote=lambda *arguments: self.calls.append((self.rank, method, *arguments)))


def make_group(group_class, role, ranks):
    calls = []
    names = tuple(f"run/{role}/{rank}" for rank in range(ranks))
    return group_class(role, names, tuple(Handle(rank, calls) for rank in range(ranks))), calls


def test_a_method_keeps_its_name_under_decorators():
    calls = []
    remote_call(Handle(0, calls), RolloutActor.poll, 3, 0.5)
    remote_stream(Handle(1, calls), TrainActor.weights, 4, "float32")
    assert calls == [(0, "poll", 3, 0.5), (1, "weights", 4, "float32")]


def test_ray_sees_streaming_methods_and_concurrency_groups():
    assert TrainActor.weights.__ray_num_returns__ == "streaming"
    assert TrainActor.write_state.__ray_concurrency_group__ == "storage"
    assert Worker.ping.__ray_concurrency_group__ == "health"


def test_an_update_reaches_every_rank_and_the_weights_come_from_rank_0():
    group, calls = make_group(PolicyGroup, "policy", 2)
    assert list(group.update("batch", "plan", "objective")) == ["run/policy/0", "run/policy/1"]
    group.weights(8, "bfloat16")
    assert list(group.join_weights("bfloat16")) == ["run/policy/1"]
    assert calls == [
        (0, "update", "batch", "plan", "objective"),
        (1, "update", "batch", "plan", "objective"),
        (0, "weights", 8, "bfloat16", False),
        (1, "join_weights", "bfloat16", False),
    ]


def test_scores_are_computed_on_one_rank():
    group, calls = make_group(RewardGroup, "reward", 2)
    group.score(1, ["prompt"], ["rollout"])
    reference, more = make_group(ReferenceGroup, "reference", 1)
    reference.score(0, ["sequence"], frozenset({"logprobs"}), 1.0, True)
    assert calls == [(1, "score", ["prompt"], ["rollout"])]
    assert more == [(0, "score", ["sequence"], frozenset({"logprobs"}), 1.0, True)]


def test_every_role_has_a_group_class_of_its_own_actors():
    assert set(GROUP_CLASSES) == set(ACTOR_CLASSES)
    assert len(set(GROUP_CLASSES.values())) == len(set(ACTOR_CLASSES.values()))
