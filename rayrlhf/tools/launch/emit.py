"""Manifests that fit a configuration: one renderer a way to start a cluster, by name."""

import difflib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayrlhf.config.launch import ClusterConfig
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.errors import UserError


@dataclass(frozen=True, slots=True)
class Launch:
    """What a manifest is made from.

    Attributes:
        config: the run.
        cluster: the machines.
        path: where the run's configuration file lies, relative to the folder that the job runs in.
        overrides: settings of the command line.
    """

    config: PPOConfig
    cluster: ClusterConfig
    path: Path
    overrides: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The run's command, with run folders on the storage that all nodes see."""
        given = [override for override in self.overrides if not override.startswith("run.root=")]
        return ["rayrlhf", "ppo", self.path.as_posix(), *given, f"run.root={self.cluster.storage.runs.as_posix()}"]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every node. None of them is a secret."""
        return {
            "HF_HOME": self.cluster.storage.models.as_posix(),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_JOB_STOP_WAIT_TIME_S": str(self.cluster.kubernetes.grace_seconds - 10),
        }


def header(what: str, launch: Launch, emit: str, cluster: str) -> str:
    """The comment that a generated file begins with: what it is and how it is made again."""
    command = ["rayrlhf", "plan", launch.path.as_posix(), *launch.overrides, "--cluster", cluster, "--emit", emit]
    return f"# {what}\n# Generated: {shlex.join(command)}\n"


def emit_manifest(
    kind: str, config: PPOConfig, cluster: ClusterConfig, path: Path, overrides: Sequence[str], source: str = "CLUSTER.yaml"
) -> str:
    """Return a manifest's text.

    Args:
        kind: `kuberay`, `ray-up` or `slurm`.
        config: the run.
        cluster: the machines.
        path: the run's configuration file, as the job will find it.
        overrides: settings of the command line.
        source: name of the cluster's file, for the comment at the top.

    Raises:
        UserError: an unknown kind, an absolute path, the run does not fit, or the cluster lacks what this kind needs.
    """
    from rayrlhf.tools.launch.kuberay import kuberay_manifest
    from rayrlhf.tools.launch.launch_plan import plan_run
    from rayrlhf.tools.launch.ray_up import ray_up_manifest
    from rayrlhf.tools.launch.remedy import advice
    from rayrlhf.tools.launch.slurm import slurm_script

    kinds: dict[str, Callable[[Launch, str], str]] = {
        "kuberay": kuberay_manifest,
        "ray-up": ray_up_manifest,
        "slurm": slurm_script,
    }
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(kinds)}"
        raise UserError(f"--emit {kind}: {hint}")
    if path.is_absolute():
        raise UserError(f"{path}: a manifest needs the path from the folder that the job runs in, not an absolute one")
    problems = plan_run(config, cluster.nodes).problems
    if problems:
        raise UserError(f"the run does not fit: {'; '.join(problems)}\n{advice(config, cluster.nodes)}")
    return kinds[kind](Launch(config, cluster, path, tuple(overrides)), source)
