"""A replica with a stage on each of two nodes, which are processes of one machine here."""

import os
import signal
import time

import pytest
import ray
from ray.exceptions import RayActorError
from ray.util import placement_group

from rayrlhf.actors.actor_group import create_actor
from rayrlhf.actors.placement import WorkerPlacement
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.engines.rollout.common import ReplicaNode, RolloutSpec, rollout_environment
from rayrlhf.weight_sync.buckets import bucketed, to_shared
from tests.engines.rollout.test_tensor_parallel import perturb
from tests.engines.rollout_cases import TINY, gap, load_network, make_requests

SECTION = RolloutSection(pipeline_parallel_size=2, max_concurrent=8, memory_gib=0.0625)
SPEC = RolloutSpec(ModelSection(path=f"{TINY}true", dtype="float32"), SECTION, seed=0, node=ReplicaNode(count=2))


def sampled(actor, network, version):
    """The gap of new rollouts, all of one version."""
    ray.get(actor.submit.remote(make_requests(1, step=version + 1), 1.0, 8))
    rollouts, unfinished = ray.get(actor.poll.remote(100))
    assert (len(rollouts), unfinished) == (4, 0)
    assert {one for rollout in rollouts for one in rollout.versions.tolist()} == {version}
    return gap(network, rollouts)


def ping_until_lost(actor):
    while True:
        ray.get(actor.ping.remote(), timeout=60)
        time.sleep(0.1)


@pytest.mark.slow
def test_a_replica_over_two_nodes_loads_every_update_and_ends_with_its_second_node(cluster):
    bundles = placement_group([{"CPU": 0.5}] * 2, "PACK")
    worker = WorkerPlacement("replica", (0, 1), 0.5, 0.0, 1)
    actor = create_actor("nodes/rollout/0", RolloutActor, worker, bundles, rollout_environment(SECTION, threads=2))
    ray.get(actor.build.remote(SPEC))
    network = load_network()
    gaps = [sampled(actor, network, -1)]
    for version in (0, 1):
        perturb(network, version)
        actor.begin_weights.remote(version)
        for bucket in bucketed(((name, parameter.detach()) for name, parameter in network.named_parameters()), 2**16):
            actor.receive_weights.remote(to_shared(bucket))
        assert ray.get(actor.finish_weights.remote()) == version
        gaps.append(sampled(actor, network, version))
    assert max(gaps) < 1e-5
    node = ray.get_actor("nodes/rollout/0/node-1")
    os.kill(ray.get(node.ping.remote()).pid, signal.SIGKILL)
    with pytest.raises(RayActorError):
        ping_until_lost(actor)
