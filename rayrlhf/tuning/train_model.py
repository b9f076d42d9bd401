"""Entry points of SFT, reward modeling, DPO and distillation on Ray Train."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rayrlhf.actors.local_machine import check_local_machine
from rayrlhf.actors.placement import ClusterResources
from rayrlhf.actors.stopped_processes import StoppedProcesses
from rayrlhf.actors.waiting import INFRASTRUCTURE_ERRORS, lost_because
from rayrlhf.config.loading.describe import describe_tuning
from rayrlhf.config.loading.load import dump_config, stored_differences
from rayrlhf.config.model import LoraSection
from rayrlhf.config.rank_groups import weight_parts
from rayrlhf.config.tuning import DistillationConfig, DPOConfig, RewardTrainingConfig, SFTConfig, TuningConfig
from rayrlhf.data.supervised.datasets import DatasetReport, SliceMapper, map_in_order
from rayrlhf.errors import ActorLostError, StoppedError, UserError
from rayrlhf.models.export import check_reward_model
from rayrlhf.models.load import load_architecture, load_tokenizer
from rayrlhf.models.router_load import check_router_loss
from rayrlhf.models.skeleton import check_memory, check_rank_groups, exported_bytes, least_training_bytes
from rayrlhf.models.start_check import check_configuration, check_tokens, describe_check
from rayrlhf.observe.host_facts import read_model_checks
from rayrlhf.observe.host_limits import FREE_BYTES, check_free_space
from rayrlhf.observe.journal import RecoveryJournal
from rayrlhf.observe.live import LiveView
from rayrlhf.observe.loop_control import StopRequest, stop_requests
from rayrlhf.observe.memory import memory_limit_bytes
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.observe.run_folder import RunFolder, check_run_folder, open_run
from rayrlhf.observe.vitals import Vitals, local_processes
from rayrlhf.storage.atomic import full_disk
from rayrlhf.tuning.data_plan import batch_plan, best_step
from rayrlhf.tuning.direct_preference_task import DirectPreferenceTask
from rayrlhf.tuning.distillation_task import DistillationTask
from rayrlhf.tuning.follow import following
from rayrlhf.tuning.held_out import LENGTH_METRIC, LengthBaseline, length_baseline
from rayrlhf.tuning.refusal import clear_refusal, raise_refusal, request_stop
from rayrlhf.tuning.sample_table import PairTable, Table
from rayrlhf.tuning.step_reward_task import StepRewardTask
from rayrlhf.tuning.task import PreferenceTask, SupervisedTask, Task
from rayrlhf.tuning.training_result import TuningResult, read_result
from rayrlhf.tuning.unpaired_task import UnpairedTask
from rayrlhf.tuning.whole_checkpoints import drop_damaged

__all__ = [
    "TuningResult",
    "check_dpo",
    "check_reward",
    "check_sft",
    "train_distillation",
    "train_dpo",
    "train_reward",
    "train_sft",
]

_KINDS: Mapping[type[TuningConfig], str] = {
    SFTConfig: "sft",
    RewardTrainingConfig: "reward",
    DPOConfig: "dpo",
    DistillationConfig: "icl distill",
}
_FREE_KEYS = (
    "export_anyway",
    "observe.",
    "workers.",
    "run.root",
    "run.resume",
    "train.epochs",
    "train.steps",
    "train.share_prefixes",
    "evaluation.every",
    "checkpoint.every",
    "checkpoint.keep",
    "data.reader",
)
"""Prefixes of keys that may change when a run resumes.

Its length and outputs, where it is carried out, and what changes rounding only.
"""


def check_sft(config: SFTConfig) -> str:
    """Check a configuration and its data without starting anything; returns the plan as text.

    Raises:
        UserError: an invalid configuration or dataset, with file, row and field.
    """
    return _check(SupervisedTask(config))


def check_reward(config: RewardTrainingConfig) -> str:
    """Check a configuration and its data, and return the plan; errors as `check_sft`."""
    return _check(_reward_task(config))


def check_dpo(config: DPOConfig) -> str:
    """Check a configuration and its data, and return the plan; errors as `check_sft`."""
    return _check(_dpo_task(config))


def train_sft(config: SFTConfig) -> TuningResult:
    """Fine-tune on texts, resuming from the last committed checkpoint.

    A finished run returns its result, unless `train.steps` or `train.epochs` has been raised.

    Raises:
        UserError: invalid configuration or data, or too few resources.
        ActorLostError: workers were lost more often than `workers.max_failures`.
        StoppedError: SIGTERM, SIGHUP or Ctrl-C; the same call resumes.
    """
    return _train(SupervisedTask(config))


def train_reward(config: RewardTrainingConfig) -> TuningResult:
    """Train a reward model on preference pairs or labeled steps, as `train_sft` does.

    Raises:
        UserError: see `train_sft`.
        ActorLostError: see `train_sft`.
        AlarmError: the model is not better than chance on held-out pairs, and `export_anyway` is not set.
    """
    return _train(_reward_task(config))


def train_dpo(config: DPOConfig) -> TuningResult:
    """Train a policy on preference pairs (DPO) or labeled answers (KTO); errors as `train_sft`."""
    return _train(_dpo_task(config))


def _reward_task(config: RewardTrainingConfig) -> Task:
    return StepRewardTask(config) if config.kind == "process" else PreferenceTask(config)


def _dpo_task(config: DPOConfig) -> Task:
    return UnpairedTask(config) if config.train.loss == "kto" else DirectPreferenceTask(config)


def train_distillation(config: DistillationConfig) -> TuningResult:
    """Distill the model's distributions under a longer context; errors as `train_sft`."""
    return _train(DistillationTask(config))


def _read(task: Task, view: LiveView, stack: ExitStack) -> "_Data":
    """Read the data in this process or on the cluster.

    The cluster then stays connected for the rest of the run.
    """
    from rayrlhf.tuning.ray_data_reader import over_cluster, through_ray_data

    if not through_ray_data(task.config.data):
        with view.wait("reading the data"):
            return _load(task)
    with view.wait("starting Ray"):
        from rayrlhf.actors.connection import connected

        stack.enter_context(connected(task.config.workers.address))
    with view.wait("reading the data through Ray Data"):
        return _load(task, over_cluster)


@dataclass(frozen=True)
class _Data:
    train: Table
    held_out: Table | None
    report: DatasetReport
    rewards: bool

    @property
    def baseline(self) -> LengthBaseline | None:
        """Length baseline of a reward model; None without held-out pairs."""
        if self.rewards and isinstance(self.train, PairTable) and isinstance(self.held_out, PairTable):
            return length_baseline(self.train, self.held_out)
        return None

    def lines(self) -> list[str]:
        held_out = len(self.held_out) if self.held_out is not None else 0
        lines = [*self.report.lines(), f"to train on: {len(self.train)}, held out for evaluation: {held_out}"]
        return lines if self.baseline is None else [*lines, self.baseline.line()]


def _check(task: Task) -> str:
    _check_start(task.config)
    data = _load(task)
    steps = batch_plan(task, data.train).total_steps
    spec = task.spec(steps)
    check = describe_check(spec.model, spec.heads, packing=spec.packing or spec.targets_only, unshared=spec.unshared)
    return "\n".join([describe_tuning(task.config), f"model: {check}", *data.lines(), f"optimizer steps: {steps}"])


def _check_start(config: TuningConfig) -> None:
    """Check run folder, model, adapters, CPUs, GPUs and memory before the data is read.

    Raises:
        UserError: the first that is wrong.
    """
    differ = partial(_differences, type(config))
    check_run_folder(config.run.folder, dump_config(config), differ, resume=config.run.resume)
    check_configuration(config.model)
    check_rank_groups(config.model, "workers", config.workers)
    check_router_loss(config.model, config.train.router_aux_loss_coefficient)
    if isinstance(config, RewardTrainingConfig) and config.kind == "outcome":
        check_reward_model(config.model)
    check_local_machine(config.workers.address, partial(_check_fits, config))
    written = 0 if config.model.lora is not None else exported_bytes(config.model)
    check_free_space(config.run.folder, FREE_BYTES + written, "the run and its model", "free some, or choose another run.root")


def _check_fits(config: TuningConfig, machine: ClusterResources) -> None:
    from rayrlhf.tuning.ray_train import worker_resources

    resources = worker_resources(config.workers, machine)
    if not resources.gpus:
        adapted = config.model.model_copy(update={"lora": LoraSection()})
        workers = 1 if config.train.sharded else config.workers.fewest // weight_parts(config.workers)
        needed, reduced = (workers * least_training_bytes(model) for model in (config.model, adapted))
        check_memory({"training": needed}, memory_limit_bytes(), {"model.lora={rank: 16}": reduced})


def _load(task: Task, map_slices: SliceMapper = map_in_order) -> _Data:
    """Read and validate all inputs before a model is loaded."""
    config = task.config
    tokenizer = load_tokenizer(config.model)
    positions = getattr(load_architecture(config.model), "max_position_embeddings", None)
    data = _Data(*task.load(tokenizer, map_slices), rewards=isinstance(config, RewardTrainingConfig))
    longest = max(table.longest for table in (data.train, data.held_out) if table is not None)
    if positions is not None and longest > positions:
        raise UserError(
            f"data.max_length {config.data.max_length}: a sample has {longest} tokens, the model {positions} positions; "
            f"expected data.max_length <= {positions}"
        )
    check_tokens(config.model, tokenizer, (table.token_ids for table in (data.train, data.held_out) if table is not None))
    return data


def _train(task: Task) -> TuningResult:
    config, started = task.config, time.monotonic()
    kind = _KINDS[type(config)]
    view = LiveView(f"rayrlhf {kind} {config.run.name}", live=None if config.observe.live else False)
    with ExitStack() as stack:
        stack.callback(view.stop)
        _check_start(config)
        data = _read(task, view, stack)
        differ = partial(_differences, type(config))
        # A run that cannot start creates no folder.
        folder = stack.enter_context(open_run(config.run.folder, dump_config(config), differ, resume=config.run.resume))
        finished = read_result(folder.path)
        if finished is not None and finished.export.is_dir() and finished.steps >= batch_plan(task, data.train).total_steps:
            view.note(f"{folder.path} is finished; its model is in {finished.export}")
            return finished
        for line in data.lines():
            view.note(line)
        _fit(task, data, folder, view, stack)
        view.note(f"model: {read_model_checks(folder.path)['model']}")
        result = TuningResult(
            folder.path,
            folder.export,
            _last_step(folder.path),
            _final_metrics(config, folder.path) | _baseline_metric(data),
            time.monotonic() - started,
        )
        result.write()
        if data.baseline is not None:
            view.note(f"held-out accuracy {result.metrics['evaluation/accuracy']:.1%}; {data.baseline.line()}")
        view.note(f"exported to {folder.export}")
        return result


def _fit(task: Task, data: _Data, folder: RunFolder, view: LiveView, stack: ExitStack) -> None:
    """Run the loop on Ray Train."""
    with view.wait("starting Ray and the workers"):
        import ray
        from ray.train import TrainingFailedError

        from rayrlhf.actors.actor_groups import wait_for_room
        from rayrlhf.actors.connection import connected
        from rayrlhf.tuning.ray_train import make_trainer, worker_resources
        from rayrlhf.tuning.tuning_loop import TuningJob

        stack.enter_context(connected(task.config.workers.address))
        resources = worker_resources(task.config.workers)
        fewest = task.config.workers.fewest
        wait_for_room({"CPU": fewest * resources.cpus, "GPU": fewest * resources.gpus}, view.note)
        reference = ray.put((data.train, data.held_out))
        job = TuningJob(task, folder.path.resolve(), Path.cwd(), reference, resources.threads)
    clear_refusal(job.folder)
    total = batch_plan(task, data.train).total_steps

    def fit() -> None:
        for line in drop_damaged(job.folder):
            view.note(line)
        _in_thread(make_trainer(job, resources).fit, job.folder, stop)

    watched = (following(job.folder, view, total), StoppedProcesses(view.note), Vitals(job.folder, local_processes))
    with stop_requests() as stop, ExitStack() as inner:
        for one in watched:
            inner.enter_context(one)
        try:
            fit_again(fit, job.folder, f"{task.config.run.name}/controller", task.config.workers.max_failures)
        except TrainingFailedError as error:
            raise_refusal(job.folder)
            raise _lost(error, task.config.workers.max_failures) from error
    raise_refusal(job.folder)
    if stop and _last_step(folder.path) < total:
        step = _last_step(folder.path)
        raise StoppedError(f"stopped after step {step} on {stop.signal_name}, with a checkpoint; the same command resumes")


def fit_again(fit: Callable[[], None], folder: Path, name: str, losses: int) -> None:
    """Call `fit` until Ray Train's controller is not lost on the way.

    Each call goes on from the last checkpoint.

    Args:
        folder: the run folder, whose journal has the losses.
        name: of the controller, there.
        losses: number of losses after which the next one is raised.

    Raises:
        ActorLostError: it was lost once more.
    """
    for left in range(losses, -1, -1):
        try:
            fit()
            return
        except INFRASTRUCTURE_ERRORS as error:
            reason = lost_because(error)
            if not left:
                again = "the same command goes on from the last checkpoint"
                raise ActorLostError(f"{name} was lost, after {losses} recoveries: {reason}; {again}", name) from error
            RecoveryJournal(folder).write("lost", name, reason, 0.0)


def _in_thread(fit: Callable[[], object], folder: Path, stop: StopRequest) -> None:
    """Run Ray Train outside of the main thread, where it would handle Ctrl-C itself."""
    fitting: Future[None] = Future()

    def work() -> None:
        try:
            fit()
            fitting.set_result(None)
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            fitting.set_exception(error)

    before = _last_step(folder)
    stop.may_abandon = lambda: _last_step(folder) == before  # the workers still load their models
    threading.Thread(target=work, name="ray-train", daemon=True).start()
    while not wait([fitting], timeout=0.5).done:
        if stop:
            request_stop(folder)
    fitting.result()


def _lost(error: object, allowed: int) -> Exception:
    """Return the workers' own error, else a lost worker."""
    import ray

    failures = dict(getattr(error, "worker_failures", None) or {})
    controller = getattr(error, "controller_failure", None)
    for failure in [*failures.values(), *([] if controller is None else [controller])]:
        if reason := full_disk(failure):
            return UserError(f"training: {reason}; free some space, then the same command resumes")
    lost = [rank for rank, failure in failures.items() if isinstance(failure, ray.exceptions.RayActorError)]
    if failures and not lost:
        return error if isinstance(error, Exception) else RuntimeError(str(error))
    ranks = ", ".join(str(rank) for rank in sorted(lost)) or "unknown"
    return ActorLostError(
        f"training worker {ranks} was lost, after {allowed} recoveries (workers.max_failures): {str(error).splitlines()[0]}; "
        "the same command goes on from the last checkpoint"
    )


def _differences(root: type[TuningConfig], stored: str, wanted: str) -> list[str]:
    """Return differences between a run folder's configuration and the current one that matter."""
    return stored_differences(root, stored, wanted, may_change=lambda key: key.startswith(_FREE_KEYS))


def _last_step(folder: Path) -> int:
    return max((int(row["step"]) for row in read_metrics(folder) if "loss" in row), default=0)


def _baseline_metric(data: _Data) -> dict[str, float]:
    return {} if data.baseline is None else {LENGTH_METRIC: data.baseline.accuracy}


def _final_metrics(config: TuningConfig, folder: Path) -> dict[str, float]:
    """Return the last loss, and the evaluation of the exported weights."""
    rows: Sequence[dict[str, Any]] = read_metrics(folder)
    last = [row["loss"] for row in rows if "loss" in row]
    best = best_step(config.checkpoint.best_metric, folder)
    evaluations = [row for row in rows if "evaluation/loss" in row and best in (None, row["step"])]
    final = {name: value for name, value in evaluations[-1].items() if name.startswith("evaluation/")} if evaluations else {}
    return {"loss": last[-1], **final}
