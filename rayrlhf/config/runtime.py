"""Sections of a run: folder, evaluation, checkpoints, placement, recovery, SFT warm-up."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.rank_groups import check_groups, group_size
from rayrlhf.config.section import RunFolderSection, RunName, Section


class RunSection(RunFolderSection):
    """Name, folder, seed and length of a run. Its folder is `root/name`."""

    name: RunName = "ppo"
    steps: int = Field(100, ge=1)
    """Steps of the run, including those before a resume."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` resumes from the newest checkpoint of the run folder; `never` refuses a folder with a run."""
    determinism: Literal["fast", "exact"] = "fast"
    """`exact` makes a resumed run repeat bit for bit on a CPU: every batch depends on (step, sample) only, roles run in turn,
    each replica gets the same batch again, and each step's metrics hold a checksum of the policy's weights. Slower than
    `fast`."""


class EvaluationSection(Section):
    """Evaluation on fixed held-out prompts before, during and after training."""

    every: int = Field(0, ge=0)
    """Steps between evaluations. 0 evaluates before and after training only."""
    prompts: int = Field(128, ge=1)
    """Number of prompts: the first ones of `data.evaluation`."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature of evaluations; 0 is greedy."""
    enabled: bool = True
    """false switches all evaluations off."""


class CheckpointSection(Section):
    """Checkpoints: durable state for resuming."""

    every: int = Field(50, ge=0)
    """Steps between checkpoints. 0 writes one at the end only."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""
    best_metric: str | None = None
    """Metric whose best checkpoint is kept too, such as `objective/scores` or `evaluation/score`. Default: none."""
    best_mode: Literal["max", "min"] = "max"
    """Direction of `best_metric`: `max` if higher is better."""
    asynchronous: bool = True
    """Copy the state in memory and write it while training continues. false waits for the disk."""
    mirror: str | None = Field(None, pattern=r"^[a-z0-9+.-]+://[^@]*$")
    """Second storage (`s3://bucket/runs`, `gs://...`, `file:///...`, or another URI of fsspec). Every checkpoint is copied to
    `mirror/run.name`. A run folder on any machine starts from the copy if its own checkpoints are older. Credentials come from
    the environment, never from the URI. Default: none."""


class ProcessPlacement(Section):
    """Resources that each process of a role requests from Ray."""

    cpus: float | None = Field(None, gt=0)
    """CPUs per process. Default: an equal share of the machine."""
    gpus: float | None = Field(None, ge=0)
    """GPUs per process. Default: 0 without GPUs, an equal fraction under `colocated`, else 1."""
    threads: int | None = Field(None, ge=1)
    """OpenMP threads per process. Default: all CPUs of the node if roles take turns, else the process's CPUs. On GPUs the CPUs
    of the node are divided among the processes that run at the same time, up to 16 each."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Required labels of the node (`ray start --labels`), with `placement.mode: disaggregated`. Default: any node."""


class RolePlacement(ProcessPlacement):
    """Processes of one role, and the resources that each requests from Ray."""

    ranks: int = Field(1, ge=1)
    """Number of processes (ranks) of the role."""


class TrainPlacement(RolePlacement):
    """Processes of a role in training, which may share tokens, weights or experts."""

    sequence_parallel: int = Field(1, ge=1)
    """Number of consecutive ranks that split each row of tokens, so that each stores 1 / `sequence_parallel` of its
    activations. Must divide `ranks`; the samples are split over the groups."""
    tensor_parallel: int = Field(1, ge=1)
    """Number of consecutive ranks that split the weights of attention and feed-forward layers, so that each stores and
    computes 1 / `tensor_parallel` of them. Must divide `ranks` and the model's heads; not with `sequence_parallel`."""
    expert_parallel: int = Field(1, ge=1)
    """Number of consecutive ranks that divide the experts of each layer among them, so that each stores 1 / `expert_parallel`
    of them. The samples are split over all ranks, and tokens are sent to their experts. Must divide `ranks` and the model's
    experts; not with `sequence_parallel` or `tensor_parallel`."""

    @property
    def group(self) -> int:
        """Number of consecutive ranks that compute the same samples."""
        return group_size(self)

    @property
    def data_ranks(self) -> int:
        """Number of shares that samples are split into."""
        return self.ranks // self.group

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        check_groups(self, self.ranks, self.ranks, "ranks")
        return self


class PlacementSection(Section):
    """Placement of the roles on the cluster."""

    mode: Literal["colocated", "disaggregated"] = "colocated"
    """`colocated`: all roles share the bundles of one placement group. `disaggregated`: every role has its own placement
    group."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Score finished rollouts while others are generated. `auto`: on if roles do not share devices."""
    policy: TrainPlacement = TrainPlacement()
    critic: TrainPlacement = TrainPlacement()
    reference: RolePlacement = RolePlacement()
    teacher: RolePlacement = RolePlacement()
    reward: RolePlacement = RolePlacement()
    judge: ProcessPlacement = ProcessPlacement()
    """Replicas of `reward.judge`."""
    rollout_cpus: float | None = Field(None, gt=0)
    """CPUs per rollout replica. Default: an equal share of the machine."""
    rollout_gpus: float | None = Field(None, ge=0)
    """GPUs per rollout replica. Default: as `gpus` of the other roles."""
    rollout_threads: int | None = Field(None, ge=1)
    """OpenMP threads per rollout replica. Default: as `threads` of the other roles."""
    rollout_labels: dict[str, str] = Field(default_factory=dict)
    """Required labels of the replicas' nodes, as `labels` of the other roles."""
    address: str | None = None
    """Ray address. Default: the cluster of the job, or a new local one."""
    wait_seconds: float = Field(3600.0, gt=0)
    """Maximum seconds to wait for CPUs and GPUs that other jobs on the cluster hold."""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        roles = [name for name in ("policy", "critic", "reference", "teacher", "reward", "judge") if getattr(self, name).labels]
        if self.mode == "colocated" and (roles or self.rollout_labels):
            raise ValueError(
                f"{roles[0]}.labels: roles that share bundles share nodes; set mode to 'disaggregated'"
                if roles
                else "rollout_labels: roles that share bundles share nodes; set mode to 'disaggregated'"
            )
        return self


class DeadlineSection(Section):
    """Maximum waits, in seconds. A timeout names the call, the actor and the start."""

    placement: float | None = Field(None, gt=0)
    """Until the cluster schedules all actors. Default: `placement.wait_seconds`."""
    start: float = Field(600.0, gt=0)
    """Until all models are loaded."""
    generate: float = Field(1800.0, gt=0)
    """Until any replica finishes a response."""
    score: float = Field(1800.0, gt=0)
    """One forward pass over a step by one role."""
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
    """Outputs of a run: event files, trackers, samples, alarms, live view."""

    tensorboard: bool = True
    """Write event files to `tensorboard/`."""
    trackers: list[Literal["wandb", "mlflow", "trackio"]] = Field(default_factory=list)
    """Experiment trackers that receive the same metrics. Configured by their own environment variables."""
    samples_per_step: int = Field(8, ge=0)
    """Rollouts written to `samples/` per step."""
    record: Literal["off", "light", "full"] = "off"
    """Record of each step in `records/`, from which `rayrlhf replay` executes the step again. `light` has rollouts, rewards,
    outputs of the models and advantages, at most 40 bytes per token. `full` adds the results of each optimizer step and a
    checksum of each parameter, for which the weights are read once per step."""
    on_alarm: Literal["warn", "checkpoint", "stop"] = "warn"
    """Reaction to the first alarm of a diagnostic. `warn` reports it, `checkpoint` also writes a checkpoint, `stop` also ends
    the run, which can be resumed. Warnings are only reported."""
    live: bool = True
    """Show the live view on a terminal; without one, plain lines are printed."""
    user_output: bool = False
    """Show the output (print and logging) of reward functions, environments and other plugins on the terminal. It is always
    written to `user_output.log`."""
    trace: bool = True
    """Write `trace.json` for Perfetto: the phases of every role over time."""
    callbacks: list[CallbackSection] = Field(default_factory=list)
    """Callbacks of your own, called in this order after the built-in ones."""


class RecoverySection(Section):
    """Restarts after infrastructure failures.

    Their number is limited. Configuration errors and bugs always end the run.
    """

    enabled: bool = True
    """false ends the run at the first lost process, with its name."""
    attempts: int = Field(3, ge=1)
    """Maximum consecutive restarts of one process without a finished step in between."""
    backoff: float = Field(1.0, ge=0)
    """Seconds before the second consecutive restart; doubled for each further one, up to a minute."""
    ping_every: float = Field(5.0, gt=0)
    """Seconds between heartbeats of every process, which run concurrently with its work."""
    ping_deadline: float = Field(30.0, gt=0)
    """Seconds without a heartbeat after which a process counts as hung and is restarted."""
    min_replicas: int = Field(1, ge=1)
    """Minimum rollout replicas; below it the run waits for a restarted one."""
    replica_wait: float = Field(600.0, gt=0)
    """Maximum seconds to wait for enough replicas; then the run writes a checkpoint and ends with the reason."""
    stop_seconds: float = Field(300.0, gt=0)
    """Maximum seconds that the current step may take after a stop signal (SIGTERM, SIGINT, SIGHUP), before the checkpoint is
    written. Sampling and scoring are abandoned after 10 s, because they change no state. An update that takes longer than
    `stop_seconds` is abandoned as well, and the run resumes from its newest checkpoint. Set it below the time that a scheduler
    waits before SIGKILL."""
    snapshot: Literal["step", "checkpoint"] = "checkpoint"
    """State from which a lost policy or critic rank is restored. `step` copies the training state to the object store after
    every step, so one step is repeated. `checkpoint` costs nothing and repeats all steps since the newest checkpoint."""


class AsyncSection(Section):
    """Asynchronous sampling: rollouts of later steps while the policy trains.

    With `max_staleness` above 0, the default of `algorithm.off_policy_correction.level` becomes `token`.
    """

    max_staleness: int = Field(0, ge=0)
    """Maximum number of weight versions a token may lag behind the policy when trained on. 0: every step waits for its own
    responses, sampled with the newest weights."""
    on_update: Literal["continue", "cut"] = "continue"
    """Unfinished responses at a weight sync: `continue` finishes them with the new weights, `cut` restarts them."""


class SFTWarmupSection(Section):
    """SFT warm-up: a short supervised start before PPO.

    It helps if the reward requires a format that an untuned model never produces. The evaluation at step 0 comes after it, so
    later evaluations show the gain of PPO.
    """

    response_field: str
    """Column of `data.train` with the target response."""
    samples: int = Field(256, ge=1)
    """Number of rows: the first ones of the shuffled training prompts, in one pass."""
    mini_batch_size: int = Field(16, ge=1)
    """Samples per optimizer step, at the policy's learning rate."""
