"""Ray Data pipeline over part files: read, stages and write stream in bounded memory.

A Ray Data block is a part in every stage, so a stage processes whole parts and the last one writes each under its own name,
atomically. Existing parts are skipped. Ray restarts actors that die and retries their part on another. The pipeline may be
killed at any time, as long as every stage is a pure function of its part.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rayrlhf.actors.ray_data import data_context, raise_cause
from rayrlhf.actors.stopped_processes import StoppedProcesses
from rayrlhf.actors.waiting import INFRASTRUCTURE_ERRORS
from rayrlhf.actors.worker import check_assigned_gpu
from rayrlhf.batch_inference.parts import PartFolder
from rayrlhf.batch_inference.stage_resources import TASK_CPUS, TASKS
from rayrlhf.errors import ActorLostError, DeadlineError, UserError
from rayrlhf.library_types import ArrowTable

_logger = logging.getLogger(__name__)
BUFFER_BYTES = 512 * 2**20
"""Maximum memory of parts between stages. Reading is faster than scoring and would fill the machine otherwise."""
PART, ROWS = "part", "rows"


@dataclass(frozen=True, slots=True)
class Pool:
    """One stage served by a pool of actors.

    Attributes:
        name: in progress and errors.
        worker: a class whose instances take a part (an Arrow table) and return a part.
        arguments: of its constructor; small and picklable.
        size: number of processes.
        cpus: per process.
        gpus: per process.
        environment: environment variables of its processes.
    """

    name: str
    worker: type
    arguments: tuple[Any, ...]
    size: int
    cpus: float
    gpus: float = 0.0
    environment: dict[str, str] = field(default_factory=dict)


Stage = Pool | Callable[[Any], Any]
"""A pool, or a function of a part for stateless work."""


def cpu_pool(name: str, worker: type, arguments: tuple[Any, ...], size: int | None) -> Pool:
    """Return a pool that divides the CPUs evenly, by default one process per CPU."""
    import ray

    cpus = ray.cluster_resources().get("CPU", 1.0)
    size = size or max(1, int(cpus))
    hundredths = int(100 * (cpus - TASKS * TASK_CPUS) / size)  # rounded down, so that the shares fit
    return Pool(name, worker, arguments, size, min(1.0, hundredths / 100))


@dataclass(frozen=True, slots=True)
class Limits:
    """Failure limits: restarts per process, and seconds without progress."""

    max_restarts: int
    stall_seconds: float


def run_pipeline(
    source: PartFolder, target: PartFolder, stages: Sequence[Stage], limits: Limits, done: Callable[[int], None]
) -> None:
    """Write the missing parts of `target`; `done` is called with the rows of each.

    Raises:
        UserError: a stage found a user error.
        ActorLostError: a process exceeded `max_restarts`.
        DeadlineError: no progress within `stall_seconds`.
    """
    import ray
    import ray.data.exceptions

    missing = sorted(set(source.indices()) - set(target.indices()))
    target.clear_leftovers()
    if not missing:
        return
    target.path.mkdir(parents=True, exist_ok=True)
    settings = {
        "execution_no_progress_timeout_s": limits.stall_seconds,
        "max_consecutive_actor_init_deaths": limits.max_restarts + 1,
    }
    with data_context(buffer_bytes=BUFFER_BYTES, **settings), StoppedProcesses(_logger.warning):
        try:
            for row in _dataset(source, target, missing, stages, limits).iter_rows():
                done(row[ROWS])
        except (ray.exceptions.RayTaskError, UserError) as error:
            raise_cause(error)
        except INFRASTRUCTURE_ERRORS as error:
            raise ActorLostError(f"a pipeline stage exceeded its restarts: {_first_line(error)}") from error
        except ray.data.exceptions.ExecutionTimeoutError as error:
            raise DeadlineError(f"no part was finished within {limits.stall_seconds:.0f} s: {_first_line(error)}") from error


class _Worker:
    """Wraps a stage's worker, and carries the part number in a column."""

    def __init__(self, worker: type, arguments: tuple[Any, ...]) -> None:
        check_assigned_gpu()
        self._worker = worker(*arguments)

    def __call__(self, table: ArrowTable) -> ArrowTable:
        return _with_part(table, self._worker)


def _with_part(table: ArrowTable, stage: Callable[[Any], Any]) -> Any:
    import pyarrow as pa

    part = table.column(PART)[0].as_py()
    result = stage(table.drop_columns([PART]))
    return result.append_column(PART, pa.array([part] * result.num_rows, pa.int64()))


def _dataset(source: PartFolder, target: PartFolder, missing: list[int], stages: Sequence[Stage], limits: Limits) -> Any:
    import pyarrow as pa
    import ray

    def read(block: ArrowTable) -> ArrowTable:
        part = block.column(PART)[0].as_py()
        table = source.read(part)
        return table.append_column(PART, pa.array([part] * table.num_rows, pa.int64()))

    def write(table: ArrowTable) -> ArrowTable:
        part = table.column(PART)[0].as_py()
        target.write(part, table.drop_columns([PART]))
        return pa.table({PART: [part], ROWS: [table.num_rows]})

    def task(function: Callable[[Any], Any], dataset: Any) -> Any:
        return dataset.map_batches(function, batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS)

    dataset = task(read, ray.data.from_items([{PART: part} for part in missing], override_num_blocks=len(missing)))
    for stage in stages:
        dataset = (
            _pooled(stage, dataset, min(stage.size, len(missing)), limits)
            if isinstance(stage, Pool)
            else task(partial(_with_part, stage=stage), dataset)
        )
    return task(write, dataset)


def _pooled(pool: Pool, dataset: Any, size: int, limits: Limits) -> Any:
    import ray

    # One part in progress and one queued; more would only be retried if the process died.
    compute = ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2)
    hidden = {} if pool.gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return dataset.map_batches(
        _Worker,
        fn_constructor_args=(pool.worker, pool.arguments),
        batch_size=None,
        batch_format="pyarrow",
        compute=compute,
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        max_restarts=limits.max_restarts,
        max_task_retries=limits.max_restarts,
        runtime_env={"env_vars": hidden | {"TOKENIZERS_PARALLELISM": "false"} | pool.environment},
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
