"""A head without CPUs and two labelled nodes as separate processes; says where they are, and ends with its standard input."""

import json
import sys

from ray.cluster_utils import Cluster

PORT = int(sys.argv[1])
SMALL = {"object_store_memory": 100 * 2**20}

if __name__ == "__main__":
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": PORT,
            **SMALL,
        },
    )
    nodes = {
        role: cluster.add_node(num_cpus=2, labels={"rayrlhf/role": role}, include_dashboard=False, **SMALL).node_id
        for role in ("train", "rollout")
    }
    print(json.dumps(nodes), flush=True)
    sys.stdin.read()
    cluster.shutdown()
