"""Additional nodes of a rollout replica that does not fit one node, one actor each.

Such an actor runs vLLM's workers of its node. The replica's own actor is the first node. It creates the others in the further
bundles of its placement group and owns them: Ray ends them with it, however it ends. When one of them is lost it ends itself,
because calls to the workers there would wait forever. So a replica over several nodes is lost and rebuilt as a whole, and the
driver sees one actor.
"""

import os
import sys
import threading
import time
from dataclasses import replace

import ray
from ray.util.placement_group import PlacementGroup, get_current_placement_group

from rayrlhf.actors.actor_group import create_actor
from rayrlhf.actors.placement import WorkerPlacement
from rayrlhf.actors.remote import Handle, Ref, remote_call
from rayrlhf.actors.waiting import fetch
from rayrlhf.actors.worker import Worker, check_assigned_gpu
from rayrlhf.engines.rollout.common import ReplicaNode, RolloutSpec
from rayrlhf.errors import ActorLostError

MISTAKE_SECONDS = 10.0
"""Wait after an error on another node: this one may find the same mistake, and its own line reaches the driver."""


class NodeActor(Worker):
    """An additional node of a replica."""

    def serve(self, spec: RolloutSpec) -> None:
        """Run vLLM's workers of this node; returns when one of them has ended."""
        from rayrlhf.engines.rollout.vllm_start import serve_node

        use_own_address()
        check_assigned_gpu()
        serve_node(spec)


class ReplicaNodes:
    """The further nodes of a replica, in a process that is its first one.

    Args:
        spec: of the replica.
        rendezvous: address and free port of this process.

    Attributes:
        spec: of this process.
    """

    def __init__(self, spec: RolloutSpec, rendezvous: tuple[str, int]) -> None:
        use_own_address()
        self.spec = replace(spec, node=ReplicaNode(0, spec.node.count, *rendezvous))
        group = get_current_placement_group()
        self._closed = False
        self._actors = [self._create(group, rank) for rank in range(1, spec.node.count)]
        serving = [
            remote_call(actor, NodeActor.serve, replace(self.spec, node=replace(self.spec.node, rank=rank)))
            for rank, actor in enumerate(self._actors, start=1)
        ]
        threading.Thread(target=self._watch, args=(serving,), name="rayrlhf-nodes", daemon=True).start()

    def close(self) -> None:
        """End the processes of the further nodes."""
        self._closed = True
        for actor in self._actors:
            ray.kill(actor)

    def _create(self, group: PlacementGroup, rank: int) -> Handle[NodeActor]:
        bundle, threads = group.bundle_specs[rank], int(os.environ["OMP_NUM_THREADS"])
        worker = WorkerPlacement("", (rank,), bundle["CPU"], bundle.get("GPU", 0.0), threads)
        return create_actor(f"{ray.get_runtime_context().get_actor_name()}/node-{rank}", NodeActor, worker, group, {})

    def _watch(self, serving: list[Ref[None]]) -> None:
        """End this process when the first of the others has ended."""
        (ended, *_), _ = ray.wait(serving)
        if self._closed:
            return
        name, reason = f"node {serving.index(ended) + 1} of the replica", "a worker process of vLLM died"
        try:
            fetch(ended, "serve", name)
        except ActorLostError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001
            reason = str(error)
            time.sleep(MISTAKE_SECONDS)
        sys.stderr.write(f"rollout: {name} is lost, and the replica ends with it: {reason}\n")
        sys.stderr.flush()
        os._exit(1)


def use_own_address() -> None:
    """Let vLLM's workers listen at this node's address in the Ray cluster.

    vLLM would take that of the default route.
    """
    os.environ["VLLM_HOST_IP"] = ray.util.get_node_ip_address()
