"""The inputs of a cluster manifest."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from rayrlhf.config.launch import ClusterConfig
from rayrlhf.config.ppo import PPOConfig


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
