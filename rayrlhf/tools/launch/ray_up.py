"""Cluster file for `ray up`, in a cloud or on existing machines.

No port of Ray is open outside the cluster: users reach the dashboard through `ray dashboard`, an ssh tunnel. The token is a
file that the user creates once; `ray up` copies it over ssh, and it is in no generated file and no command line.
"""

from typing import Any

import yaml

from rayrlhf.errors import UserError
from rayrlhf.tools.launch.launch_spec import Launch, header

_TOKEN = "~/.ray/auth_token"  # noqa: S105 - a path


def ray_up_manifest(launch: Launch, source: str) -> str:
    """Return the file for `ray up`.

    Raises:
        UserError: the cluster file lacks a setting of the provider.
    """
    cloud, nodes = launch.cluster.cloud, launch.cluster.nodes
    ray = f"{launch.cluster.slurm.environment}/bin/ray" if cloud.provider == "local" else "ray"
    tree: dict[str, Any] = {"cluster_name": launch.cluster.name}
    if cloud.provider != "local":
        tree["max_workers"] = nodes.count
    tree |= {
        "provider": _provider(launch),
        "auth": {"ssh_user": cloud.user},
        "file_mounts": {_TOKEN: f"~/.ray/{launch.cluster.name}-token"},
        "setup_commands": [f"chmod 600 {_TOKEN}"],
        "head_start_ray_commands": [
            f"{ray} stop",
            _start(
                ray,
                "--head --port=6379 --dashboard-host=127.0.0.1 --num-cpus=0 --autoscaling-config=~/ray_bootstrap_config.yaml",
            ),
        ],
        "worker_start_ray_commands": [f"{ray} stop", _start(ray, "--address=$RAY_HEAD_IP:6379")],
    }
    if cloud.provider == "local":
        environment = launch.cluster.slurm.environment
        tree["setup_commands"].append(f"test -x {environment}/bin/rayrlhf")  # fails if it is not installed
    else:
        tree["docker"] = {
            "image": launch.cluster.image,
            "container_name": launch.cluster.name,
            "run_options": ["--ulimit nofile=65536:65536", *(["--gpus all"] if nodes.gpus else [])],
        }
        tree["head_node_type"] = "head"
        tree["available_node_types"] = {
            "head": {"resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0, "node_config": _machine(launch, head=True)},
            "worker": {
                "resources": {"CPU": nodes.cpus} | ({"GPU": nodes.gpus} if nodes.gpus else {}),
                "min_workers": nodes.count,
                "max_workers": nodes.count,
                "node_config": _machine(launch, head=False),
            },
        }
    text = header("Cluster file for `ray up`. See cluster/README.md first.", launch, "ray-up", source)
    return text + yaml.safe_dump(tree, sort_keys=False, width=120)


def _start(ray: str, arguments: str) -> str:
    return f"ulimit -n 65536; RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={_TOKEN} {ray} start {arguments}"


def _provider(launch: Launch) -> dict[str, Any]:
    cloud = launch.cluster.cloud
    if cloud.provider == "local":
        if len(cloud.hosts) != launch.cluster.nodes.count + 1:
            wanted = launch.cluster.nodes.count + 1
            raise UserError(f"cloud.hosts: expected {wanted} addresses, the head first, found {len(cloud.hosts)}")
        return {"type": "local", "head_ip": cloud.hosts[0], "worker_ips": cloud.hosts[1:]}
    if cloud.provider == "gcp":
        if cloud.project is None:
            raise UserError("cloud.project: gcp needs the project's name")
        return {
            "type": "gcp",
            "region": cloud.region,
            "availability_zone": cloud.zone,
            "project_id": cloud.project,
            "use_internal_ips": False,
        }
    return {"type": "aws", "region": cloud.region, "availability_zone": cloud.zone, "use_internal_ips": False}


def _machine(launch: Launch, *, head: bool) -> dict[str, Any]:
    cloud = launch.cluster.cloud
    kind = cloud.head_type if head else cloud.worker_type
    if cloud.provider == "gcp":
        disk = {"boot": True, "autoDelete": True, "initializeParams": {"diskSizeGb": 200}}
        return {"machineType": kind, "disks": [disk]}
    # The instance metadata service issues credentials; version 2 rejects forged requests through a process (SSRF).
    return {
        "InstanceType": kind,
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "BlockDeviceMappings": [
            {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 200, "VolumeType": "gp3", "Encrypted": True}}
        ],
    }
