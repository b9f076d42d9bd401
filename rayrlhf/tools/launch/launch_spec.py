"""The inputs of a cluster manifest."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from rayrlhf.config.launch import ClusterConfig
from rayrlhf.config.ppo import PPOConfig


@dataclass(frozen=True, slots=True)
class Launch:
    """Inputs of a manifest.

    Attributes:
        path: the run's configuration file, relative to the job's folder.
        overrides: settings of the command line.
    """

    config: PPOConfig
    cluster: ClusterConfig
    path: Path
    overrides: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The run's command, with run folders on shared storage."""
        kept = [override for override in self.overrides if not override.startswith("run.root=")]
        return ["rayrlhf", "ppo", self.path.as_posix(), *kept, f"run.root={self.cluster.storage.runs.as_posix()}"]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of every node, without secrets."""
        return {
            "HF_HOME": self.cluster.storage.models.as_posix(),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_JOB_STOP_WAIT_TIME_S": str(self.cluster.kubernetes.grace_seconds - 10),
        }


def header(what: str, launch: Launch, emit: str, cluster: str) -> str:
    """Return the comment at the top of a generated file: its purpose and its command."""
    command = ["rayrlhf", "plan", launch.path.as_posix(), *launch.overrides, "--cluster", cluster, "--emit", emit]
    return f"# {what}\n# Generated: {shlex.join(command)}\n"
