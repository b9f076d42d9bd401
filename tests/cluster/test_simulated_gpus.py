"""Eight nodes of eight GPUs that are numbers only, but known to a real Ray: roles land where `plan` says, or are refused."""

import time

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group, placement_group_table, remove_placement_group

from rayrlhf.actors.actor_groups import read_cluster_resources
from rayrlhf.actors.placement import ClusterResources, make_plan
from rayrlhf.errors import UserError
from rayrlhf.tools.launch.role_layout import lay_out
from tests.actors.test_placement import config

pytestmark = pytest.mark.slow
NODES, GPUS, CPUS = 8, 8.0, 32.0
DISAGGREGATED = {
    "placement": {"mode": "disaggregated", "policy": {"ranks": 16}, "critic": {"ranks": 8}, "reference": {"ranks": 4}},
    "rollout": {"replicas": 6, "tensor_parallel_size": 4},
}
COLOCATED = {
    "placement": {role: {"ranks": 16} for role in ("policy", "critic", "reference")},
    "rollout": {"replicas": 4, "tensor_parallel_size": 8},
}


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster()
    for _ in range(NODES):
        cluster.add_node(num_cpus=CPUS, num_gpus=GPUS, include_dashboard=False, object_store_memory=80 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes(60)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def granted(plan):
    """Node of every bundle of every group, as Ray grants them."""
    groups = {}
    try:
        for name, group in plan.groups.items():
            groups[name] = placement_group([dict(bundle) for bundle in group.bundles], group.strategy)
        assert all(group.wait(30) for group in groups.values())
        return {name: placement_group_table(group)["bundles_to_node_id"] for name, group in groups.items()}
    finally:
        for group in groups.values():
            remove_placement_group(group)
        # Ray frees their room in its own time; what comes next would be packed around it.
        end = time.monotonic() + 30
        while ray.available_resources().get("GPU") != NODES * GPUS and time.monotonic() < end:
            time.sleep(0.1)


@pytest.mark.parametrize("sections", [DISAGGREGATED, COLOCATED], ids=["disaggregated", "colocated"])
def test_ray_places_processes_together_as_the_plan_does_and_packs_every_replica(cluster, sections):
    machine = read_cluster_resources()
    assert machine == ClusterResources((CPUS,) * NODES, (GPUS,) * NODES)
    plan = make_plan(config(**sections), machine)
    nodes = granted(plan)
    for name, group in plan.groups.items():
        assert len(nodes[name]) == len(group.bundles)
        if group.strategy == "STRICT_PACK":
            assert len(set(nodes[name].values())) == 1
    # Nodes have no order in Ray, so what must agree is how many nodes each role's processes fill. Replicas are groups of their
    # own, placed in whatever order Ray comes to them: each is whole on one node, but two of them may share one or not.
    seated = {}
    for role, workers in plan.workers.items():
        seated[role] = len({nodes[worker.group][worker.bundles[0]] for worker in workers})
    for role in plan.workers.keys() - {"rollout"}:
        planned = len({place.node for place in lay_out(plan, machine) if place.role == role})
        assert seated[role] == planned, role


def test_a_plan_that_cannot_be_is_refused_within_seconds_with_asked_against_available(cluster):
    started = time.monotonic()
    too_many = config(placement={"mode": "disaggregated", "policy": {"ranks": 40}, "critic": {"ranks": 30}})
    with pytest.raises(UserError, match=r"requested .* and 72 GPUs .*but the cluster has 256 CPUs and 64 GPUs"):
        make_plan(too_many, read_cluster_resources())
    wide = config(rollout={"replicas": 1, "tensor_parallel_size": 16}, placement={"mode": "disaggregated"})
    with pytest.raises(UserError, match="on one node, available:"):
        lay_out(make_plan(wide, read_cluster_resources()), read_cluster_resources())
    assert time.monotonic() - started < 5
