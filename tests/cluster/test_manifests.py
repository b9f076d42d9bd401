"""The files of `cluster/`: in step with what `plan --emit` writes, valid where they will be read, and safe by default."""

import copy
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from rayrlhf.config.launch import ClusterConfig
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError
from rayrlhf.tools.launch.emit import emit_manifest
from tests.cluster.kuberay import problems

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))
RAY_UP = sorted((CLUSTER / "ray-up").glob("*.yaml"))
SLURM = sorted((CLUSTER / "slurm").glob("*.sbatch"))


def named(path):
    return str(path.relative_to(CLUSTER))


def resource(path):
    return next(yaml.safe_load_all(path.read_text()))


def tool(name):
    """A linter of the test environment."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def pods(resource):
    spec = resource["spec"].get("rayClusterSpec", resource["spec"])
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_every_file_is_what_plan_emits_for_its_example_and_there_are_no_others(monkeypatch):
    monkeypatch.syspath_prepend(str(CLUSTER))
    from generate import manifests

    written = dict(manifests())
    assert set(written) == {*KUBERAY, *RAY_UP, *SLURM}
    for path, text in written.items():
        assert path.read_text() == text, f"{path}: run python cluster/generate.py"


@pytest.mark.parametrize("path", KUBERAY, ids=named)
def test_a_kuberay_manifest_passes_the_strict_schema_and_the_operators_rules(path):
    assert problems(resource(path)) == []


PLANTED = {
    "a misspelled field": lambda spec: spec["rayClusterSpec"].update(rayVersoin="2.60.0"),
    "a misspelled field of a pod": lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(
        terminationGracePeriodSecond=1
    ),
    "text for a number": lambda spec: spec.update(backoffLimit="3"),
    "a mode there is not": lambda spec: spec.update(submissionMode="Sidecar"),
    "a time to live without shutdown": lambda spec: spec.update(shutdownAfterJobFinishes=False),
    "retries with a selector": lambda spec: spec.update(clusterSelector={"ray.io/cluster": "x"}),
    "no authentication": lambda spec: spec["rayClusterSpec"].pop("authOptions"),
    "authentication before Ray had it": lambda spec: spec["rayClusterSpec"].update(rayVersion="2.51.0"),
    "more replicas than the most": lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(replicas=9),
    "labels where the operator ignores them": lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].update(
        rayStartParams={"labels": "a=b"}
    ),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_found(mistake):
    broken = copy.deepcopy(resource(CLUSTER / "kuberay" / "multi-node.yaml"))
    PLANTED[mistake](broken["spec"])
    assert problems(broken)


@pytest.mark.parametrize("path", KUBERAY, ids=named)
def test_pods_are_guaranteed_unprivileged_and_have_time_to_write_a_checkpoint(path):
    for pod in pods(resource(path)):
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert pod["automountServiceAccountToken"] is False
        wait = next(item["value"] for item in container["env"] if item["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
        assert 30 <= int(wait) < pod["terminationGracePeriodSeconds"]
        script = Path(container["lifecycle"]["preStop"]["exec"]["command"][0])
        assert f"{script.name} {script}" in (CLUSTER / "Dockerfile").read_text()
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("path", KUBERAY, ids=named)
def test_kuberay_clusters_want_a_token_and_answer_to_no_one_else(path):
    first, policy = yaml.safe_load_all(path.read_text())
    cluster = first["spec"].get("rayClusterSpec", first["spec"])
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    for rule in policy["spec"]["ingress"]:
        assert all("podSelector" in source for source in rule["from"])


def test_train_and_rollout_groups_carry_the_labels_that_the_run_asks_for():
    job = resource(CLUSTER / "kuberay" / "multi-node.yaml")
    groups = {group["groupName"]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    assert {name: (group["labels"], group["replicas"]) for name, group in groups.items()} == {
        "train": ({"rayrlhf/role": "train"}, 1),
        "rollout": ({"rayrlhf/role": "rollout"}, 1),
    }
    assert "{rayrlhf/role: rollout}" in job["spec"]["entrypoint"]
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "rayrlhf"}


@pytest.mark.parametrize("path", RAY_UP, ids=named)
def test_a_ray_up_file_passes_rays_schema_opens_no_port_and_starts_with_a_token(path):
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    tree = resource(path)
    jsonschema.validate(tree, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree | {"cluster_nmae": "x"}, schema)
    starts = [command for key in ("head", "worker") for command in tree[f"{key}_start_ray_commands"] if " start " in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert not re.search(r"0\.0\.0\.0", path.read_text())


@pytest.mark.parametrize("path", [*SLURM, CLUSTER / "before-stop.sh"], ids=named)
def test_a_script_passes_shellcheck(path, tmp_path):
    shellcheck = tool("shellcheck")
    assert subprocess.run([shellcheck, path], capture_output=True, text=True).stdout == ""
    broken = tmp_path / path.name
    broken.write_text(path.read_text().replace('"$head_address:6379"', "$head_address").replace('"$job"', "$job"))
    assert subprocess.run([shellcheck, broken], capture_output=True).returncode == 1


@pytest.mark.parametrize("path", SLURM, ids=named)
def test_slurm_nodes_are_exclusive_and_the_token_stays_in_its_file(path):
    text = path.read_text()
    assert "#SBATCH --exclusive" in text
    assert "export RAY_AUTH_MODE=token" in text
    assert re.search(r"RAY_AUTH_TOKEN=", text) is None


def test_the_dockerfile_passes_hadolint_and_ends_unprivileged(tmp_path):
    hadolint, path = tool("hadolint"), CLUSTER / "Dockerfile"
    found = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")
    stages = path.read_text().split("\nFROM ")
    assert [stage.split()[2] for stage in stages[1:]][-2:] == ["cpu", "gpu"]
    assert all("USER 1000:1000" in stage for stage in stages[-2:])
    broken = tmp_path / "Dockerfile"
    broken.write_text(path.read_text().replace("--no-install-recommends ", ""))
    assert subprocess.run([hadolint, broken], capture_output=True).returncode == 1


def test_what_a_pod_runs_before_it_goes_can_be_run():
    assert (CLUSTER / "before-stop.sh").stat().st_mode & stat.S_IXUSR


def loaded(*settings):
    run = load_config(PPOConfig, ROOT / "examples" / "gsm8k" / "cpu.yaml")
    return run, load_config(ClusterConfig, None, ["nodes.memory_gib=24", *settings])


@pytest.mark.parametrize(
    ("kind", "path", "settings", "words"),
    [
        ("kubray", "run.yaml", [], "did you mean kuberay"),
        ("slurm", "/home/me/run.yaml", [], "absolute"),
        ("slurm", "run.yaml", ["nodes.memory_gib=1"], "does not fit"),
        ("ray-up", "run.yaml", ["cloud.provider=gcp"], "cloud.project"),
        ("ray-up", "run.yaml", ["cloud.provider=local"], "expected 2 addresses"),
    ],
)
def test_what_cannot_be_emitted_is_one_clear_line(kind, path, settings, words):
    run, cluster = loaded(*settings)
    with pytest.raises(UserError, match=words):
        emit_manifest(kind, run, cluster, Path(path), [])


def test_names_and_images_cannot_smuggle_yaml_or_shell():
    for setting in ("name=a b", "image=x; rm -rf /", "slurm.environment=$(id)", "kubernetes.namespace=A"):
        with pytest.raises(UserError):
            load_config(ClusterConfig, None, [setting])
    run, cluster = loaded()
    text = emit_manifest("slurm", run, cluster, Path("run.yaml"), ["run.name=$(id)"])
    assert "'run.name=$(id)'" in text
    assert " run.name=$(id)" not in text
