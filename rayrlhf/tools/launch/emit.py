"""Cluster manifests for a configuration, with one renderer per kind of cluster."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from rayrlhf.config.launch import ClusterConfig
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError
from rayrlhf.tools.launch.kuberay import kuberay_manifest
from rayrlhf.tools.launch.launch_plan import plan_run
from rayrlhf.tools.launch.launch_spec import Launch
from rayrlhf.tools.launch.ray_up import ray_up_manifest
from rayrlhf.tools.launch.remedy import advice
from rayrlhf.tools.launch.slurm import slurm_script

RENDERERS: dict[str, Callable[[Launch, str], str]] = {
    "kuberay": kuberay_manifest,
    "ray-up": ray_up_manifest,
    "slurm": slurm_script,
}
"""Value of `--emit` -> the function that renders the manifest."""


def emit_manifest(
    kind: str, config: PPOConfig, cluster: ClusterConfig, path: Path, overrides: Sequence[str], source: str = "CLUSTER.yaml"
) -> str:
    """Return a manifest's text.

    Args:
        kind: `kuberay`, `ray-up` or `slurm`.
        path: the run's configuration file, relative to the job's folder.
        source: name of the cluster file, for the comment at the top.

    Raises:
        UserError: an unknown kind, an absolute path, the run does not fit, or the cluster lacks what this kind needs.
    """
    if kind not in RENDERERS:
        near = difflib.get_close_matches(kind, RENDERERS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(RENDERERS)}"
        raise UserError(f"--emit {kind}: {hint}")
    if path.is_absolute():
        raise UserError(f"{path}: a manifest needs a path relative to the job's folder, not an absolute one")
    problems = plan_run(config, cluster.nodes).problems
    if problems:
        raise UserError(f"the run does not fit: {'; '.join(problems)}\n{advice(config, cluster.nodes)}")
    return RENDERERS[kind](Launch(config, cluster, path, tuple(overrides)), source)
