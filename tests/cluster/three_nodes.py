"""A head without CPUs and two labeled nodes as separate processes; says where they are, and ends with its standard input.

Each node has a temporary folder of its own, as on machines of their own: nodes that share one unpack a job's working directory
to the same place, the second one under the feet of a driver that has started there.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from ray.cluster_utils import Cluster

PORT = int(sys.argv[1])
SMALL = {"object_store_memory": 100 * 2**20}

if __name__ == "__main__":
    # Not pytest's folder: the path of a Unix socket has at most 107 bytes.
    with TemporaryDirectory(prefix="nodes-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": True,
                "dashboard_host": "127.0.0.1",
                "dashboard_port": PORT,
                "dashboard_agent_listen_port": None,  # any: by default all clusters of a machine want the same one
                **SMALL,
            },
        )
        nodes = {}
        for role in ("train", "rollout"):
            place = Path(folder) / role
            place.mkdir()
            labels = {"rayrlhf/role": role}
            nodes[role] = cluster.add_node(
                num_cpus=2, labels=labels, include_dashboard=False, temp_dir=str(place), **SMALL
            ).node_id
        print(json.dumps(nodes), flush=True)
        sys.stdin.read()
        cluster.shutdown()
