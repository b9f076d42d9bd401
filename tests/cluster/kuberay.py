"""Strict validation of KubeRay resources without a cluster: the CRD's schema without room for unknown fields, and what a schema
cannot say (the CRD's CEL rules and the operator's own checks), in Python."""

import gzip
import json
import re
from functools import cache
from pathlib import Path

import jsonschema

FIXTURES = Path(__file__).parent.parent / "fixtures" / "kuberay"
MODES = {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"}
DNS_1035 = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")


@cache
def schema(kind):
    text = gzip.decompress((FIXTURES / f"{kind.lower()}s-v1.schema.json.gz").read_bytes())
    return strict(json.loads(text))


def strict(node):
    """The schema with every object closed: an operator drops unknown fields without a word."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {key: strict(value) for key, value in node.items()}
    if isinstance(node.get("properties"), dict) and node.get("type") == "object":
        open_ended = "additionalProperties" in node or node.get("x-kubernetes-preserve-unknown-fields")
        if not open_ended:
            result["additionalProperties"] = False
    if node.get("nullable"):
        result["type"] = [node["type"], "null"]
    if node.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return result


def problems(resource):
    """All that is wrong with a RayJob or a RayCluster, one line each."""
    kind = resource["kind"]
    validator = jsonschema.Draft202012Validator(schema(kind))
    # The CRD leaves `metadata` open; Kubernetes itself does not.
    found = [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(resource)]
    if found:
        return found  # the rules below may read values of the right type
    unknown = set(resource["metadata"]) - {"name", "namespace", "labels", "annotations"}
    found = [f"metadata: unknown {name}" for name in sorted(unknown)]
    name = resource["metadata"]["name"]
    if not DNS_1035.match(name) or len(name) > (47 if kind == "RayJob" else 53):
        found.append(f"metadata/name: {name}")
    spec = resource["spec"]
    cluster = spec if kind == "RayCluster" else spec.get("rayClusterSpec", {})
    return [*found, *(_job_rules(spec) if kind == "RayJob" else []), *_cluster_rules(cluster)]


def _job_rules(spec):
    deletion = spec.get("deletionStrategy", {})
    legacy = "onSuccess" in deletion or "onFailure" in deletion
    rules = {
        "ttlSecondsAfterFinished needs shutdownAfterJobFinishes": spec.get("ttlSecondsAfterFinished", 0) > 0
        and not spec.get("shutdownAfterJobFinishes"),
        "submissionMode there is not": spec.get("submissionMode", "K8sJobMode") not in MODES,
        "deletionRules exclude shutdownAfterJobFinishes": "deletionRules" in deletion and spec.get("shutdownAfterJobFinishes"),
        "legacy deletion policies exclude deletionRules": legacy and "deletionRules" in deletion,
        "backoffLimit excludes clusterSelector": spec.get("backoffLimit", 0) > 0 and "clusterSelector" in spec,
        "backoffLimit excludes InteractiveMode": spec.get("backoffLimit", 0) > 0
        and spec.get("submissionMode") == "InteractiveMode",
        "SidecarMode has no submitterPodTemplate": spec.get("submissionMode") == "SidecarMode"
        and "submitterPodTemplate" in spec,
        "rayClusterSpec or clusterSelector": ("rayClusterSpec" in spec) == ("clusterSelector" in spec),
        "suspension needs shutdownAfterJobFinishes": spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"),
    }
    return [rule for rule, broken in rules.items() if broken]


def _cluster_rules(spec):
    version = tuple(int(part) for part in spec.get("rayVersion", "0.0").split(".")[:2])
    auth = spec.get("authOptions", {})
    names = [group.get("groupName") for group in spec.get("workerGroupSpecs", [])]
    rules = {
        "authOptions.mode must be given": "mode" not in auth,
        "token mode needs rayVersion 2.52": auth.get("mode") == "token" and version < (2, 52),
        "group names must differ": len(names) != len(set(names)),
    }
    found = [rule for rule, broken in rules.items() if broken]
    for group in spec.get("workerGroupSpecs", []):
        name = group.get("groupName")
        if not group.get("minReplicas", 0) <= group.get("replicas", 0) <= group.get("maxReplicas", 0):
            found.append(f"{name}: minReplicas <= replicas <= maxReplicas")
        if "labels" in group.get("rayStartParams", {}):
            found.append(f"{name}: labels belong to the group, not to rayStartParams")
        if any(key.startswith("ray.io/") for key in group.get("labels", {})):
            found.append(f"{name}: labels of ray.io are Ray's own")
    return found
