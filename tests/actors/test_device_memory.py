"""Memory of a shared GPU returns to the device at the end of each call, and a replica that found none is tried again."""

from types import SimpleNamespace

import pytest
import torch

from rayrlhf.actors import replica_pool, worker
from rayrlhf.actors.replica_pool import ReplicaPool
from rayrlhf.actors.reward_actor import RewardActor
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.actors.scoring_actors import ReferenceActor
from rayrlhf.actors.train_actor import PolicyActor
from rayrlhf.errors import DeviceMemoryError, UserError
from rayrlhf.observe.cuda import CudaFacts
from rayrlhf.ppo.step_driver import StepDriver


@pytest.fixture
def emptied(monkeypatch):
    """Times at which torch's allocator was emptied."""
    times = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: times.append(True))
    return times


def calls():
    """Calls of each role that compute on its device."""
    report = SimpleNamespace(
        update=lambda *_: "report",
        score=lambda *_, **__: [],
        export=lambda *_: None,
        weight_buckets=lambda *_, **__: [[], []],
        capture_state=dict,
        checksums=dict,
    )
    policy, reference, reward = PolicyActor(), ReferenceActor(), RewardActor()
    policy._engine = reference._engine = report
    return [
        (policy, lambda: policy.update(None, None, None)),
        (policy, lambda: policy.score([], frozenset(), 1.0, False)),
        (policy, lambda: policy.export(None)),
        (policy, lambda: list(policy.weights(1, "float32"))),
        (policy, policy.snapshot),
        (policy, policy.checksums),
        (reference, lambda: reference.score([], frozenset(), 1.0, False)),
        (reward, lambda: reward.score([], [])),
    ]


@pytest.mark.parametrize("index", range(8))
@pytest.mark.parametrize("shares", [True, False])
def test_each_call_of_a_role_that_shares_its_gpu_returns_memory(emptied, index, shares):
    actor, call = calls()[index]
    actor.__dict__["shares_gpu"] = shares
    call()
    assert len(emptied) == shares


def test_a_call_that_fails_returns_memory_too(emptied):
    policy = PolicyActor()
    policy.__dict__["shares_gpu"] = True
    policy._engine = SimpleNamespace(update=lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy.update(None, None, None)
    assert emptied == [True]


def test_a_process_without_a_share_of_a_gpu_keeps_its_memory(emptied):
    assert not PolicyActor().shares_gpu


def test_a_rebuild_without_room_is_a_loss_and_not_the_end_of_the_run(monkeypatch):
    def full(*_):
        raise DeviceMemoryError("rollout: vLLM cannot serve m: Free memory on device cuda:0 (3.1/79.1 GiB)")

    lost = []
    monkeypatch.setattr(replica_pool, "fetch", full)
    pool = SimpleNamespace(lost=lambda replica, error: lost.append(str(error)))
    ReplicaPool._finish_build(pool, SimpleNamespace(name="run/rollout/0", building=None), None)
    assert ["Free memory" in line for line in lost] == [True]


@pytest.mark.parametrize(
    ("role", "build"),
    [
        (PolicyActor, (None, None)),
        (ReferenceActor, (None, 1, False, "auto")),
        (RewardActor, (None, "auto")),
        (RolloutActor, (None,)),
    ],
)
def test_an_actor_whose_gpu_torch_cannot_use_is_refused_in_one_line(monkeypatch, role, build):
    context = SimpleNamespace(
        get_assigned_resources=lambda: {"GPU": 0.5}, get_actor_name=lambda: "run/policy/0", get_actor_id=lambda: None
    )
    monkeypatch.setattr(worker.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(worker.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(worker.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    facts = CudaFacts("2.13.0+cpu", None, 0, "580.95.05", 1, "0")
    monkeypatch.setattr(worker, "read_cuda", lambda: facts)
    line = r"^run/policy/0 on node 10\.0\.0\.7: Ray assigned 0\.5 GPUs, but torch 2\.13\.0\+cpu is a build without CUDA; .*$"
    actor = role()
    actor.__dict__ |= {"actor_metrics": SimpleNamespace(served=lambda *_: None), "shares_gpu": False}
    with pytest.raises(UserError, match=line):
        actor.build(*build)
    monkeypatch.setattr(worker, "read_cuda", lambda: facts._replace(usable=1))
    worker.check_assigned_gpu()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_policys_device_says_in_which_dtype_weights_travel(dtype):
    policy = SimpleNamespace(sync_dtype=lambda: {"policy": dtype}, wait=lambda calls, *_: list(calls.values()))
    config = SimpleNamespace(deadlines=SimpleNamespace(sync=1.0))
    assert StepDriver.sync_dtype.func(SimpleNamespace(actor_groups={"policy": policy}, config=config)) == dtype
