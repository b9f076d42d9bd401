"""What a run does about processes, nodes and waits that fail."""

from typing import Literal

from pydantic import Field

from rayrlhf.config.section import Section


class RecoverySection(Section):
    """Failures of the infrastructure are repaired a bounded number of times; a user's mistake or a bug never is."""

    enabled: bool = True
    """False ends the run at the first lost process, with its name."""
    attempts: int = Field(3, ge=1)
    """Most rebuilds of one process in a row, without a finished step in between."""
    backoff: float = Field(1.0, ge=0)
    """Seconds before the second rebuild in a row; doubled for each further one, up to a minute."""
    ping_every: float = Field(5.0, gt=0)
    """Seconds between pings of every process, answered beside its work."""
    ping_deadline: float = Field(30.0, gt=0)
    """Seconds without an answer to a ping after which a process counts as hung, is ended, and rebuilt."""
    min_replicas: int = Field(1, ge=1)
    """Rollout replicas a run needs to go on; below that it waits for a rebuilt one."""
    replica_wait: float = Field(600.0, gt=0)
    """Longest wait, in seconds, for enough replicas; then the run writes a checkpoint and ends with the reason."""
    snapshot: Literal["step", "checkpoint"] = "checkpoint"
    """Where a lost policy or critic rank goes back to: `step` copies the training state to the object store after every
    step, so that one step is repeated; `checkpoint` costs nothing and repeats all steps since the newest checkpoint."""
