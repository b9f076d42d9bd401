"""Kubernetes manifests: a KubeRay RayJob (or an interactive RayCluster) and its network policy.

Secure by default: token authentication from a Secret, no privileges, no service account token; only the cluster's own pods
reach Ray. Requests equal limits, so that a pod is never evicted for using its requested memory. Before a pod terminates, the
head signals the run to stop and waits; the run writes a checkpoint, and the next cluster resumes it from the shared volume.
"""

import shlex
from typing import Any

import ray
import yaml

from rayrlhf.tools.launch.launch_spec import Launch, header

USER = 1000
"""User and group of the image; `cluster/Dockerfile` creates them."""
HEAD_CPUS, HEAD_GIB = 4, 16
"""The head runs the driver and Ray's own services, no model."""
DASHBOARD, METRICS = 8265, 8080
CODE = "/home/ray/rayrlhf"
"""Folder of examples and code in the image; jobs start in another folder."""
SUBMITTER_LABELS = {"rayrlhf/part": "submitter"}
STOP_SCRIPT = "/opt/rayrlhf/before-stop.sh"
"""Script in the image: the head signals the running job to stop and waits for it; a worker waits for the head."""


def kuberay_manifest(launch: Launch, source: str) -> str:
    """Return the documents of one run as YAML."""
    kubernetes = launch.cluster.kubernetes
    cluster = _cluster_spec(launch)
    workload = _ray_cluster(launch, cluster) if kubernetes.interactive else _ray_job(launch, cluster)
    text = header(f"{workload['kind']} for KubeRay 1.7 or newer. See cluster/README.md first.", launch, "kuberay", source)
    documents = [workload, _network_policy(launch)]
    return text + "---\n".join(yaml.safe_dump(document, sort_keys=False, width=120) for document in documents)


def _metadata(launch: Launch, labels: dict[str, str] | None = None) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": launch.cluster.name, "namespace": launch.cluster.kubernetes.namespace}
    return metadata | ({"labels": labels} if labels else {})


def _ray_job(launch: Launch, cluster: dict[str, Any]) -> dict[str, Any]:
    kubernetes = launch.cluster.kubernetes
    queue = {"kueue.x-k8s.io/queue-name": kubernetes.queue} if kubernetes.queue else None
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(launch, queue),
        "spec": {
            "entrypoint": f"cd {CODE} && {shlex.join(launch.command)}",
            "submissionMode": "K8sJobMode",
            "backoffLimit": kubernetes.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "preRunningDeadlineSeconds": 3600,
            "metadata": {"run": launch.config.run.name},
            "submitterPodTemplate": {"metadata": {"labels": SUBMITTER_LABELS}, "spec": _submitter(launch)},
            "rayClusterSpec": cluster,
        },
    }


def _ray_cluster(launch: Launch, cluster: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": _metadata(launch), "spec": cluster}


def _cluster_spec(launch: Launch) -> dict[str, Any]:
    return {
        "rayVersion": ray.__version__,
        "authOptions": {"mode": "token", "secretName": launch.cluster.kubernetes.token_secret},
        "enableInTreeAutoscaling": False,
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            # No actors on the head: it must survive failures of nodes with models.
            "rayStartParams": {"num-cpus": "0"},
            "template": {"spec": _pod(launch, _resources(HEAD_CPUS, HEAD_GIB, 0), head=True)},
        },
        "workerGroupSpecs": [_group(launch, *group) for group in _groups(launch)],
    }


def _groups(launch: Launch) -> list[tuple[str, int, dict[str, str]]]:
    """Return name, node count and labels of each worker group, one per set of labels."""
    from rayrlhf.actors.placement import ClusterResources, make_plan
    from rayrlhf.tools.launch.role_layout import lay_out

    nodes = launch.cluster.nodes
    machine = ClusterResources((float(nodes.cpus),) * nodes.count, (float(nodes.gpus),) * nodes.count)
    plan = make_plan(launch.config, machine)
    labeled: dict[tuple[tuple[str, str], ...], set[int]] = {}
    for place in lay_out(plan, machine):
        group = plan.groups[plan.workers[place.role][place.rank].group]
        if group.labels:
            labeled.setdefault(tuple(sorted(group.labels.items())), set()).add(place.node)
    groups = [("-".join(value for _, value in labels), len(used), dict(labels)) for labels, used in sorted(labeled.items())]
    rest = nodes.count - sum(size for _, size, _ in groups)
    return [*groups, ("workers", rest, {})] if rest else groups


def _group(launch: Launch, name: str, size: int, labels: dict[str, str]) -> dict[str, Any]:
    nodes = launch.cluster.nodes
    group: dict[str, Any] = {
        "groupName": name,
        "replicas": size,
        "minReplicas": size,
        "maxReplicas": size,
        "numOfHosts": 1,
        "rayStartParams": {},
        "template": {"spec": _pod(launch, _resources(nodes.cpus, nodes.main_memory_gib, nodes.gpus), head=False)},
    }
    return group | ({"labels": labels} if labels else {})


def _resources(cpus: float, gibibytes: float, gpus: int) -> dict[str, Any]:
    """Requests that equal limits."""
    amount = {"cpu": f"{cpus:g}", "memory": f"{gibibytes:g}Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {"requests": dict(amount), "limits": dict(amount)}


def _pod(launch: Launch, resources: dict[str, Any], *, head: bool) -> dict[str, Any]:
    kubernetes = launch.cluster.kubernetes
    container: dict[str, Any] = {
        "name": "ray-head" if head else "ray-worker",
        "image": launch.cluster.image,
        "resources": resources,
        "env": [{"name": name, "value": value} for name, value in launch.environment.items()],
        "securityContext": _container_security(),
        "volumeMounts": [{"name": name, "mountPath": path.as_posix()} for name, _, path in _volumes(launch)]
        + [{"name": "scratch", "mountPath": "/tmp"}],  # noqa: S108 - Ray's session folder
    }
    container["lifecycle"] = {"preStop": {"exec": {"command": [STOP_SCRIPT, "head" if head else "worker"]}}}
    if head:
        container["ports"] = [
            {"name": "gcs", "containerPort": 6379},
            {"name": "dashboard", "containerPort": DASHBOARD},
            {"name": "client", "containerPort": 10001},
            {"name": "metrics", "containerPort": METRICS},
        ]
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": kubernetes.grace_seconds,
        "automountServiceAccountToken": False,
        "securityContext": _pod_security(),
        "containers": [container],
        "volumes": [{"name": name, "persistentVolumeClaim": {"claimName": claim}} for name, claim, _ in _volumes(launch)]
        + [{"name": "scratch", "emptyDir": {}}],
    }
    if "nvidia.com/gpu" in resources["limits"]:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return pod


def _submitter(launch: Launch) -> dict[str, Any]:
    """Return the submitter pod, which follows the log; KubeRay adds command, address and token."""
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": _pod_security(),
        "containers": [
            {
                "name": "ray-job-submitter",
                "image": launch.cluster.image,
                "resources": _resources(0.5, 1, 0),
                "securityContext": _container_security(),
            }
        ],
    }


def _volumes(launch: Launch) -> list[tuple[str, str, Any]]:
    storage = launch.cluster.storage
    return [("runs", storage.runs_claim, storage.runs), ("models", storage.models_claim, storage.models)]


def _pod_security() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _network_policy(launch: Launch) -> dict[str, Any]:
    """Return the network policy: only Ray pods and the submitter reach Ray.

    Prometheus reaches the metrics port.
    """
    ray_pods = {"podSelector": {"matchExpressions": [{"key": "ray.io/node-type", "operator": "Exists"}]}}
    submitters = {"podSelector": {"matchLabels": SUBMITTER_LABELS}}
    operator = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    }
    prometheus = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(launch),
        "spec": {
            "podSelector": {"matchExpressions": [{"key": "ray.io/node-type", "operator": "Exists"}]},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [ray_pods]},
                {"from": [submitters, operator], "ports": [{"protocol": "TCP", "port": DASHBOARD}]},
                {"from": [prometheus], "ports": [{"protocol": "TCP", "port": METRICS}]},
            ],
        },
    }
