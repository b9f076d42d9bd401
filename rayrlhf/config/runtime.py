"""A short supervised start before PPO.

The run itself: its folder, seed, evaluation, checkpoints, placement and deadlines.

What a run does about processes, nodes and waits that fail.

Sampling ahead: rollouts of later steps while the policy still trains.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Section


class RunSection(Section):
    """Identity and length of a run. Its folder is `root/name`."""

    name: str = Field("ppo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    root: Path = Path("runs")
    """Folder that run folders lie in."""
    seed: int = Field(0, ge=0)
    """Everything random follows from it."""
    steps: int = Field(100, ge=1)
    """Steps until the run is done; one that resumes counts those before."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest checkpoint of the run folder; `never` refuses a folder that has a run in it."""
    determinism: Literal["fast", "exact"] = "fast"
    """`exact` makes every batch depend on (step, sample) only, so that a resumed run repeats bit for bit on a CPU: roles take
    turns, every replica gets the same batch again, and each step's metrics hold a checksum of the policy's weights."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / self.name


class EvaluationSection(Section):
    """Sampling and scoring of a fixed held-out prompt set before, during and after training."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0 evaluates before and after only."""
    prompts: int = Field(128, ge=1)
    """The first n prompts of `data.evaluation`."""
    temperature: float = Field(0.0, ge=0)
    """0 answers greedily."""
    enabled: bool = True
    """False answers no held-out prompts at all."""


class CheckpointSection(Section):
    """Durable state for resuming."""

    every: int = Field(50, ge=0)
    """Steps between checkpoints; 0 writes one at the end only."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that stay."""
    best_metric: str | None = None
    """A metric (`objective/scores`, `evaluation/score`, ...) whose best checkpoint stays as well."""
    best_mode: Literal["max", "min"] = "max"
    """Whether a higher or a lower `best_metric` is better."""
    asynchronous: bool = True
    """Copy the state in memory and write it while training goes on; False waits for the disk."""
    mirror: str | None = Field(None, pattern=r"^[a-z0-9+.-]+://[^@]*$")
    """A folder on other storage (`s3://bucket/runs`, `gs://...`, `file:///...`, or another that fsspec knows): every checkpoint
    is copied to `mirror/run.name` as well, and a run folder that has none as new, on whichever machine, begins with it.
    Credentials come from the environment, never from the URI."""


class RolePlacement(Section):
    """Processes of one role and what each of them asks Ray for."""

    ranks: int = Field(1, ge=1)
    """Processes that share the role's work."""
    cpus: float | None = Field(None, gt=0)
    """Per process; an equal share of the machine when not given."""
    gpus: float | None = Field(None, ge=0)
    """Per process; 0 on a machine without GPUs, and a fair fraction under `colocated`, when not given."""
    threads: int | None = Field(None, ge=1)
    """OpenMP threads per process; when not given, all CPUs of the node if phases take turns, else the share of CPUs."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels that a node must have (`ray start --labels`), with `placement.mode: disaggregated`; any node when empty."""


class PlacementSection(Section):
    """Where roles run."""

    mode: Literal["colocated", "disaggregated"] = "colocated"
    """`colocated` shares each bundle among the roles; `disaggregated` gives every role a placement group of its own."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Score finished rollouts while others are generated. `auto`: on where roles do not share devices."""
    policy: RolePlacement = RolePlacement()
    critic: RolePlacement = RolePlacement()
    reference: RolePlacement = RolePlacement()
    reward: RolePlacement = RolePlacement()
    rollout_cpus: float | None = Field(None, gt=0)
    """CPUs of one replica; a fair share when not given."""
    rollout_gpus: float | None = Field(None, ge=0)
    """GPUs of one replica; as `gpus` of the other roles when not given."""
    rollout_threads: int | None = Field(None, ge=1)
    """OpenMP threads of one replica; as `threads` of the other roles when not given."""
    rollout_labels: dict[str, str] = Field(default_factory=dict)
    """As `labels` of the other roles."""
    address: str | None = None
    """Ray address; a job's own cluster, or a new local one, when not given."""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        roles = [name for name in ("policy", "critic", "reference", "reward") if getattr(self, name).labels]
        if self.mode == "colocated" and (roles or self.rollout_labels):
            raise ValueError(
                f"{roles[0]}.labels: roles that share bundles share nodes; set mode to 'disaggregated'"
                if roles
                else "rollout_labels: roles that share bundles share nodes; set mode to 'disaggregated'"
            )
        return self


class DeadlineSection(Section):
    """Longest waits, in seconds. An overrun names what was waited for, on whom, and since when."""

    placement: float = Field(120.0, gt=0)
    """Until the cluster has room for all actors."""
    start: float = Field(600.0, gt=0)
    """Until all models are loaded."""
    generate: float = Field(1800.0, gt=0)
    """Until some replica finishes something."""
    score: float = Field(1800.0, gt=0)
    """One reading of a step by one role."""
    update: float = Field(3600.0, gt=0)
    """All optimizer steps of a PPO step, or a checkpoint."""
    sync: float = Field(600.0, gt=0)
    """Each bucket of a weight sync."""


class CallbackSection(Section):
    """A callback of the run."""

    name: str
    """`module:Class` or `path/to/file.py:Class`, a subclass of `rayrlhf.Callback`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class."""


class ObserveSection(Section):
    """What a run writes and shows."""

    tensorboard: bool = True
    """Write event files to `tensorboard/`."""
    trackers: list[Literal["wandb", "mlflow", "trackio"]] = Field(default_factory=list)
    """Experiment trackers that get the same numbers. Where they keep them is set by their own environment variables."""
    samples_per_step: int = Field(8, ge=0)
    """Rollouts written to `samples/` each step."""
    on_alarm: Literal["warn", "checkpoint", "stop"] = "warn"
    """What happens when a diagnostic first sounds an alarm: it is told; and a checkpoint is written; and the run ends,
    resumable. Warnings are only told."""
    live: bool = True
    """The terminal view; plain lines where there is no terminal."""
    trace: bool = True
    """Write `trace.json` for Perfetto: who did what when."""
    callbacks: list[CallbackSection] = Field(default_factory=list)
    """The user's own callbacks, called in this order after the built-in ones."""


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


class AsyncSection(Section):
    """How far sampling may run ahead of training.

    With `max_staleness` above 0, the default of `algorithm.off_policy_correction.level` becomes `token`.
    """

    max_staleness: int = Field(0, ge=0)
    """Most weight versions that a token may be old when it is learned from. 0: every step waits for its own responses, sampled
    with the newest weights."""
    on_update: Literal["continue", "cut"] = "continue"
    """What becomes of unfinished responses when new weights come: they go on with them, or begin anew."""


class SFTWarmupSection(Section):
    """Imitate given responses for a moment, so that rewards which ask for a form have something to reinforce."""

    response_field: str
    """Column of `data.train` that holds the response to imitate."""
    samples: int = Field(256, ge=1)
    """Rows to imitate, the first of the shuffled training prompts; each is seen once."""
    mini_batch_size: int = Field(16, ge=1)
    """Samples of one optimizer step, at the policy's own learning rate."""
