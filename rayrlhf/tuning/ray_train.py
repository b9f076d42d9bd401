"""Ray Train settings of a run: workers, their resources, checkpoints and retries."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from rayrlhf.actors.actor_groups import read_cluster_resources
from rayrlhf.actors.placement import ClusterResources
from rayrlhf.actors.waiting import lost_because
from rayrlhf.config.tuning import TuningCheckpointSection, WorkersSection
from rayrlhf.errors import UserError
from rayrlhf.observe.journal import RecoveryJournal
from rayrlhf.tuning.data_plan import TRAIN_NAME
from rayrlhf.tuning.tuning_loop import TuningJob, train_loop

SILENCE = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
SILENCE_SECONDS = "120"
"""Ray Train's variable, and our default for it (Ray's is 600): time after which a worker that does not respond is lost."""


class LossRecorder(UserCallback):  # type: ignore[misc]
    """Writes lost workers to the run's journal, which the command shows.

    Args:
        folder: the run folder.
        run: name of the run.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self._folder, self._run = folder, run

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Write one event per lost worker."""
        for rank, error in worker_exceptions.items():
            RecoveryJournal(self._folder).write("lost", f"{self._run}/worker/{rank}", lost_because(error), 0.0)


@dataclass(frozen=True, slots=True)
class WorkerResources:
    """Resources and compute threads of one worker."""

    cpus: float
    gpus: float
    threads: int


def worker_resources(workers: WorkersSection, machine: ClusterResources | None = None) -> WorkerResources:
    """Resolve the resources that the configuration does not set.

    Args:
        machine: available resources; None means the connected cluster.

    Raises:
        UserError: the cluster cannot hold the minimum number of workers.
    """
    machine = machine or read_cluster_resources()
    gpus = workers.gpus if workers.gpus is not None else float(machine.gpus >= workers.fewest)
    share = machine.cpus / workers.most
    cpus = workers.cpus if workers.cpus is not None else (float(int(share)) if share >= 1 else share)
    for name, wanted, there in (("cpus", cpus, machine.node_cpus), ("gpus", gpus, machine.node_gpus)):
        room = sum(int(amount / wanted + 1e-9) for amount in there) if wanted else workers.fewest
        if room < workers.fewest:
            raise UserError(
                f"workers: {workers.fewest} x {wanted:g} {name} requested, but the cluster's nodes have "
                f"{', '.join(f'{amount:g}' for amount in there)}"
            )
    threads = workers.threads or max(1, int(cpus))
    return WorkerResources(cpus, gpus, threads)


def make_trainer(job: TuningJob, resources: WorkerResources) -> TorchTrainer:
    """Return the trainer; its checkpoints are in the run folder, and the same folder resumes."""
    config = job.task.config
    workers = config.workers
    os.environ.setdefault(SILENCE, SILENCE_SECONDS)
    elastic = workers.fewest != workers.most
    environment = {"OMP_NUM_THREADS": str(resources.threads)}
    if workers.most > 1 and not resources.gpus:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning workers would take cores from each other
    return TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(workers.fewest, workers.most) if elastic else workers.most,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {}),
        ),
        run_config=RunConfig(
            name=TRAIN_NAME,
            storage_path=str(job.folder / "checkpoints"),
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=checkpoint_config(config.checkpoint),
            worker_runtime_env={"env_vars": environment},
            callbacks=[LossRecorder(job.folder, config.run.name)],
        ),
    )


def checkpoint_config(section: TuningCheckpointSection) -> CheckpointConfig:
    """Keep the last checkpoints, or the best ones by a held-out metric.

    Ray Train always keeps the last one.
    """
    if section.best_metric is None:
        return CheckpointConfig(num_to_keep=section.keep)
    order = "min" if section.best_metric == "loss" else "max"
    return CheckpointConfig(
        num_to_keep=section.keep,
        checkpoint_score_attribute=f"evaluation/{section.best_metric}",
        checkpoint_score_order=order,
    )
