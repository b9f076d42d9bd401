"""A head without CPUs and two labelled nodes that can be lost and replaced: one command a line on standard input.

    lose NAME     end a node's processes as a power cut would
    add NAME      a new node with the same label
    left          placement groups and named actors that are there, from the cluster's own books

Each is answered by a line of JSON; everything ends with the input. Each node has a temporary folder of its own, as on machines
of their own.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

SMALL = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
NODES = ("train", "rollout")


class TwoNodes:
    """The cluster, and what a command does to it."""

    def __init__(self, folder):
        self._folder = Path(folder)
        self._made = 0
        self._nodes = {}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
        for name in NODES:
            self.add(name)

    def add(self, name):
        self._made += 1
        place = self._folder / str(self._made)
        place.mkdir()
        labels = {"rayrlhf/role": name}
        self._nodes[name] = self.cluster.add_node(num_cpus=8, labels=labels, temp_dir=str(place), **SMALL)
        return self._nodes[name].node_id

    def lose(self, name):
        node = self._nodes.pop(name)
        self.cluster.remove_node(node, allow_graceful=False)
        return node.node_id

    def left(self):
        if not ray.is_initialized():
            ray.init(self.cluster.address, log_to_driver=False, logging_level="error")
        groups = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
        return {"groups": groups, "actors": ray.util.list_named_actors(all_namespaces=True)}


if __name__ == "__main__":
    # Not pytest's folder: the path of a Unix socket has at most 107 bytes.
    with TemporaryDirectory(prefix="nodes-", ignore_cleanup_errors=True) as folder:
        nodes = TwoNodes(folder)
        print(json.dumps(nodes.cluster.address), flush=True)
        for line in sys.stdin:
            command, *arguments = line.split()
            print(json.dumps(getattr(nodes, command)(*arguments)), flush=True)
        ray.shutdown()  # a node that this process is connected to is not removed, and the cluster's address would stay behind
        nodes.cluster.shutdown()
