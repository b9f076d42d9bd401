"""The cluster a run is planned for: machines, image, storage. No part of a run's own configuration.

What a simulated run is made of: rates that were measured somewhere, a cluster's size, lengths, failures.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from rayrlhf.config.section import Section

Name = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"


class NodeSection(Section):
    """The machines that do the work; all are alike."""

    count: int = Field(1, ge=1)
    gpus: int = Field(0, ge=0)
    """GPUs of one node."""
    gpu_memory_gib: float = Field(80.0, gt=0)
    """Memory of one GPU."""
    cpus: int = Field(4, ge=1)
    """CPU cores of one node that Ray may use."""
    memory_gib: float | None = Field(None, gt=0)
    """Main memory of one node; 16 GiB and 128 more for every GPU when not given."""

    @property
    def main_memory_gib(self) -> float:
        """Main memory of one node, assumed where it was not given."""
        return self.memory_gib or 16.0 + 128.0 * self.gpus


class StorageSection(Section):
    """Folders that all nodes see."""

    runs: Path = Path("/runs")
    """Where run folders are written; a shared file system, so that a run resumes on another node."""
    models: Path = Path("/models")
    """Cache of downloaded models."""
    runs_claim: str = Field("rayrlhf-runs", pattern=Name)
    """Kubernetes: the ReadWriteMany claim behind `runs`."""
    models_claim: str = Field("rayrlhf-models", pattern=Name)
    """Kubernetes: the claim behind `models`."""


class KubernetesSection(Section):
    """What only KubeRay needs."""

    namespace: str = Field("rayrlhf", pattern=Name)
    queue: str | None = Field(None, pattern=Name)
    """A Kueue LocalQueue: the job waits until all of its pods fit at once."""
    token_secret: str = Field("rayrlhf-ray-token", pattern=Name)
    """Secret with the key `auth_token`."""
    grace_seconds: int = Field(600, ge=30)
    """How long a pod may take to end: a step and a checkpoint."""
    retries: int = Field(3, ge=0)
    """New clusters after a failure; each resumes the run."""
    interactive: bool = False
    """A RayCluster that stays, instead of a RayJob that ends."""


class CloudSection(Section):
    """What only `ray up` needs."""

    provider: Literal["aws", "gcp", "local"] = "aws"
    region: str = Field("us-west-2", min_length=1)
    """AWS region or GCP region."""
    zone: str = Field("us-west-2a", min_length=1)
    """Availability zone."""
    project: str | None = None
    """GCP project; needed there."""
    head_type: str = Field("m6i.2xlarge", min_length=1)
    """Machine type of the head, which trains nothing."""
    worker_type: str = Field("m6i.4xlarge", min_length=1)
    """Machine type of the nodes."""
    hosts: list[str] = Field(default_factory=list)
    """`local`: addresses, the head first, then one for each node."""
    user: str = Field("ubuntu", min_length=1)
    """Who `ray up` logs in as."""


class SlurmSection(Section):
    """What only Slurm needs."""

    partition: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$")
    time: str = Field("24:00:00", pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")
    """Wall time of the job, [days-]hours:minutes:seconds."""
    environment: str = Field(".venv", pattern=r"^[A-Za-z0-9_./-]+$")
    """Folder of the virtual environment, seen by all nodes; also where `ray up` looks for it on machines that are there."""


class ClusterConfig(Section):
    """Everything `rayrlhf plan --cluster` reads."""

    name: str = Field("rayrlhf", pattern=Name)
    """First part of the names of what is made."""
    image: str = Field("ghcr.io/example/rayrlhf:0.2.0-cpu", pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$")
    """Container image for head and nodes, made from `cluster/Dockerfile`; replace it by your own."""
    nodes: NodeSection = NodeSection()
    storage: StorageSection = StorageSection()
    kubernetes: KubernetesSection = KubernetesSection()
    cloud: CloudSection = CloudSection()
    slurm: SlurmSection = SlurmSection()


class LengthSection(Section):
    """Response lengths: log-normal, cut at `rollout.max_new_tokens` of the simulated run. A spread of 0 makes all equal."""

    median: float = Field(256.0, gt=0)
    """In tokens."""
    spread: float = Field(0.8, ge=0)
    """Standard deviation of the logarithm; long-tailed reasoning has 1 and more."""


class RateSection(Section):
    """How fast the parts are. A run's metrics have them: `time/*` and `speed/*`."""

    token_seconds: float = Field(0.02, gt=0)
    """Time of one token of one response, on a replica with all its places taken."""
    score_tokens: float = Field(100_000.0, gt=0)
    """Tokens a second through reward, reference, critic and old log-probs together."""
    update_tokens: float = Field(20_000.0, gt=0)
    """Tokens a second through an update, all epochs included, all ranks together."""
    sync_seconds: float = Field(1.0, ge=0)
    """Time in which a weight sync keeps all replicas from sampling."""
    prompt_tokens: float = Field(128.0, ge=0)
    """Tokens of a prompt; scored and trained with the response, free to sample."""


class FailureSection(Section):
    """Replicas that die now and then."""

    hours_between: float | None = Field(None, gt=0)
    """Mean time between failures of one replica, in hours; none when not given."""
    rebuild_seconds: float = Field(120.0, ge=0)
    """Time until another process serves in its place."""


class SimulationConfig(Section):
    """Everything `rayrlhf plan --simulate` needs beside the run's own configuration."""

    steps: int = Field(20, ge=2)
    """PPO steps to simulate; the first only fills the pipeline and is not in the averages."""
    replicas: int | None = Field(None, ge=1)
    """Rollout replicas; `rollout.replicas` when not given."""
    max_staleness: int | None = Field(None, ge=0)
    """Weight versions that a response may be behind when it is trained on; `async.max_staleness` of the run when not given."""
    lengths: LengthSection = LengthSection()
    rates: RateSection = RateSection()
    failures: FailureSection = FailureSection()
    seed: int = 0
