"""Cluster of a launch plan, and rates of a simulated run.

Neither is part of a run's own configuration.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from rayrlhf.config.section import Section

Name = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"


class NodeSection(Section):
    """Worker nodes; all are equal."""

    count: int = Field(1, ge=1)
    """Number of nodes."""
    gpus: int = Field(0, ge=0)
    """GPUs per node."""
    gpu_memory_gib: float = Field(80.0, gt=0)
    """Memory of a GPU, in GiB."""
    cpus: int = Field(4, ge=1)
    """CPU cores per node that Ray may use."""
    memory_gib: float | None = Field(None, gt=0)
    """Main memory per node, in GiB. Default: 16, plus 128 per GPU."""

    @property
    def main_memory_gib(self) -> float:
        """Main memory per node, in GiB."""
        return self.memory_gib or 16.0 + 128.0 * self.gpus


class StorageSection(Section):
    """Folders shared by all nodes."""

    runs: Path = Path("/runs")
    """Parent of run folders, on a shared file system, so that a run resumes on another node."""
    models: Path = Path("/models")
    """Cache of downloaded models."""
    runs_claim: str = Field("rayrlhf-runs", pattern=Name)
    """Kubernetes: ReadWriteMany claim of `runs`."""
    models_claim: str = Field("rayrlhf-models", pattern=Name)
    """Kubernetes: claim of `models`."""


class KubernetesSection(Section):
    """Settings of KubeRay."""

    namespace: str = Field("rayrlhf", pattern=Name)
    """Kubernetes namespace."""
    queue: str | None = Field(None, pattern=Name)
    """Kueue LocalQueue, in which the job waits until all of its pods fit at the same time. Default: none."""
    token_secret: str = Field("rayrlhf-ray-token", pattern=Name)
    """Secret with the key `auth_token`."""
    grace_seconds: int = Field(600, ge=30)
    """Maximum seconds for a pod to end: a step and a checkpoint."""
    retries: int = Field(3, ge=0)
    """Maximum new clusters after failures; each resumes the run."""
    interactive: bool = False
    """Create a persistent RayCluster instead of a RayJob."""


class CloudSection(Section):
    """Settings of `ray up`."""

    provider: Literal["aws", "gcp", "local"] = "aws"
    """Cloud provider; `local` takes existing machines."""
    region: str = Field("us-west-2", min_length=1)
    """Region of AWS or GCP."""
    zone: str = Field("us-west-2a", min_length=1)
    """Availability zone."""
    project: str | None = None
    """GCP project; required for `gcp`."""
    head_type: str = Field("m6i.2xlarge", min_length=1)
    """Machine type of the head node, which does not train."""
    worker_type: str = Field("m6i.4xlarge", min_length=1)
    """Machine type of the worker nodes."""
    hosts: list[str] = Field(default_factory=list)
    """Addresses of `provider: local`: the head, then one per node."""
    user: str = Field("ubuntu", min_length=1)
    """Login user of `ray up`."""


class SlurmSection(Section):
    """Settings of Slurm."""

    partition: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$")
    """Slurm partition. Default: the cluster's own."""
    time: str = Field("24:00:00", pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")
    """Wall time of the job, [days-]hours:minutes:seconds."""
    environment: str = Field(".venv", pattern=r"^[A-Za-z0-9_./-]+$")
    """Folder of the virtual environment, shared by all nodes; also used by `ray up` with `provider: local`."""


class ClusterConfig(Section):
    """Configuration of `rayrlhf plan --cluster`."""

    name: str = Field("rayrlhf", pattern=Name)
    """Prefix of the names of created resources."""
    image: str = Field("ghcr.io/example/rayrlhf:0.2.0-cpu", pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$")
    """Container image of head and nodes, built from `cluster/Dockerfile`; replace it with your own."""
    nodes: NodeSection = NodeSection()
    storage: StorageSection = StorageSection()
    kubernetes: KubernetesSection = KubernetesSection()
    cloud: CloudSection = CloudSection()
    slurm: SlurmSection = SlurmSection()


class LengthSection(Section):
    """Log-normal response lengths, truncated at `rollout.max_new_tokens`."""

    median: float = Field(256.0, gt=0)
    """Median length, in tokens."""
    spread: float = Field(0.8, ge=0)
    """Standard deviation of the logarithm. 0 makes all lengths equal; long-tailed reasoning has 1 and more."""


class RateSection(Section):
    """Measured rates, from the metrics `time/*` and `speed/*` of a run."""

    token_seconds: float = Field(0.02, gt=0)
    """Seconds per token of a response, on a fully occupied replica."""
    score_tokens: float = Field(100_000.0, gt=0)
    """Tokens per second of scoring: reward, reference, critic and old log-probs together."""
    update_tokens: float = Field(20_000.0, gt=0)
    """Tokens per second of an update, including all epochs, over all ranks."""
    sync_seconds: float = Field(1.0, ge=0)
    """Seconds of a weight sync, during which no replica samples."""
    prompt_tokens: float = Field(128.0, ge=0)
    """Tokens per prompt. They count in scoring and training; the simulation ignores their cost in sampling."""


class FailureSection(Section):
    """Failures of rollout replicas."""

    hours_between: float | None = Field(None, gt=0)
    """Mean time between failures of one replica, in hours. Default: no failures."""
    rebuild_seconds: float = Field(120.0, ge=0)
    """Seconds until the replica is restarted."""


class SimulationConfig(Section):
    """Configuration of `rayrlhf plan --simulate`, in addition to the run's."""

    steps: int = Field(20, ge=2)
    """Steps to simulate. The first one fills the pipeline and is not averaged."""
    replicas: int | None = Field(None, ge=1)
    """Rollout replicas. Default: `rollout.replicas`."""
    max_staleness: int | None = Field(None, ge=0)
    """Maximum staleness in weight versions. Default: `async.max_staleness` of the run."""
    lengths: LengthSection = LengthSection()
    rates: RateSection = RateSection()
    failures: FailureSection = FailureSection()
    seed: int = 0
    """Seed of lengths and failures."""
