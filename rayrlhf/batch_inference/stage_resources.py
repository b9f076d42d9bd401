"""CPUs, GPUs and processes of each streaming stage, and its progress line.

Every actor pool holds its CPUs for its lifetime. A pool with all CPUs would starve the tasks that read and write, and the
pipeline would deadlock. So the pools always leave CPUs for those tasks, even on a machine with one core.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rayrlhf.config.batch_inference import GenerateSection, PipelineSection
from rayrlhf.errors import UserError
from rayrlhf.observe.progress import duration

TASK_CPUS = 0.1
"""CPUs of one read or write task, which mostly waits for I/O."""
TASKS = 2
"""Read and write tasks that always have CPUs."""
SHARED_SCORER_CPUS = 0.25
"""CPUs of a scorer while generators run."""


@dataclass(frozen=True, slots=True)
class StageResources:
    """Number of processes, and the resources of each.

    Attributes:
        generators: generator processes; 0 when nothing is generated.
        generator_cpus: CPUs per generator.
        generator_gpus: GPUs per generator.
        generator_threads: OpenMP threads per generator.
        scorer_cpus: CPUs per scorer.
    """

    generators: int
    generator_cpus: float
    generator_gpus: float
    generator_threads: int
    scorers: int
    scorer_cpus: float


def stage_resources(
    pipeline: PipelineSection, generate: GenerateSection, cpus: float, gpus: float, *, generating: bool
) -> StageResources:
    """Divide the cluster among generators and scorers.

    Args:
        generate: sets the GPUs per generator (`tensor_parallel_size`).
        generating: False for a pass that only scores.

    Raises:
        UserError: the cluster has fewer resources than requested, or a generator fewer GPUs than it spans.
    """
    free = cpus - TASKS * TASK_CPUS
    if not generating:
        scorers = pipeline.scorers or max(1, int(cpus))
        return StageResources(0, 0.0, 0.0, 1, scorers, min(1.0, _floor(free / scorers)))
    generators = pipeline.generators
    scorers = pipeline.scorers or max(1, int((cpus - generators) / 2))
    left = (free - scorers * SHARED_SCORER_CPUS) / generators
    # On a GPU a generator needs one CPU to drive it; on CPUs it computes with all that are left.
    gpu_share = float(generate.tensor_parallel_size) if gpus else 0.0
    generator_gpus = gpu_share if pipeline.generator_gpus is None else pipeline.generator_gpus
    if 0 < generator_gpus < generate.tensor_parallel_size and generate.tensor_parallel_size > 1:
        raise UserError(
            f"pipeline.generator_gpus: a generator takes whole GPUs, expected {generate.tensor_parallel_size} "
            f"(generate.tensor_parallel_size), found {generator_gpus:g}"
        )
    generator_cpus = pipeline.generator_cpus or _floor(min(left, 1.0) if generator_gpus else left)
    requested = generators * generator_cpus + scorers * SHARED_SCORER_CPUS + TASKS * TASK_CPUS
    if generator_cpus <= 0 or requested > cpus + 1e-6 or generators * generator_gpus > gpus:
        raise UserError(
            f"pipeline: {generators} generators with {max(generator_cpus, 0):g} CPUs and {generator_gpus:g} GPUs each and "
            f"{scorers} scorers do not fit into {cpus:g} CPUs and {gpus:g} GPUs; set fewer"
        )
    threads = pipeline.generator_threads or max(1, int(cpus // generators))
    return StageResources(generators, generator_cpus, generator_gpus, threads, scorers, SHARED_SCORER_CPUS)


def _floor(value: float) -> float:
    """Round down to two decimals, so that the fractions fit into the total."""
    return int(value * 100 + 1e-6) / 100


def cluster_resources(pipeline: PipelineSection, generate: GenerateSection, *, generating: bool) -> StageResources:
    """Divide the resources of the connected cluster; see `stage_resources`."""
    import ray

    total = ray.cluster_resources()
    return stage_resources(pipeline, generate, total.get("CPU", 1.0), total.get("GPU", 0.0), generating=generating)


class ProgressSink(Protocol):
    """Output of progress lines, such as `LiveView`."""

    def note(self, text: str) -> None:
        """Print a line permanently."""
        ...


class PartProgress:
    """Prints rows done, rows per second and time left."""

    def __init__(self, view: ProgressSink, *, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Set the interval between lines in seconds, and a monotonic clock."""
        self._view, self._seconds, self._clock = view, seconds, clock

    def note(self, text: str) -> None:
        """Print a line."""
        self._view.note(text)

    def rows(self, text: str, total: int) -> Callable[[int], None]:
        """Return a function to call with the rows of each finished part."""
        started = last = self._clock()
        count = 0

        def done(rows: int) -> None:
            nonlocal count, last
            count += rows
            now = self._clock()
            if count < total and now - last < self._seconds:
                return
            last = now
            speed = count / max(now - started, 1e-9)
            left = f", {duration((total - count) / speed)} left" if count < total else f" in {duration(now - started)}"
            self._view.note(f"{text}: {count} of {total} rows, {speed:.0f} rows/s{left}")

        return done
