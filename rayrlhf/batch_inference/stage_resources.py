"""How far a stage is, as a plain line now and then: rows done, rows a second, time to go.

What each streaming stage asks Ray for: a pure function of the configuration and the machine.

Every pool pins its CPUs for as long as it lives, so a pool that takes all of them starves the tasks that read and write, and
the pipeline stands still. Here the pools leave room for those tasks on any machine, down to one core.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rayrlhf.config.presft import GenerateSection, PipelineSection
from rayrlhf.errors import UserError
from rayrlhf.observe.progress import duration

TASK_CPUS = 0.1
"""Of one reading or writing task; they are mostly waiting."""
TASKS = 2
"""Reading and writing tasks that always find room."""
SCORER_CPUS_BESIDE_GENERATORS = 0.25


@dataclass(frozen=True, slots=True)
class StageResources:
    """Processes and what each of them asks for.

    Attributes:
        generators: generator processes; 0 when nothing is generated.
        generator_cpus: of each.
        generator_gpus: of each.
        generator_threads: OpenMP threads of each.
        scorers: scorer processes.
        scorer_cpus: of each.
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
    """Divide the machine.

    Args:
        pipeline: what the user fixed.
        generate: says how many devices a generator spans.
        cpus: of the cluster.
        gpus: of the cluster.
        generating: whether this pass samples anything.

    Raises:
        UserError: the cluster has less than was asked for.
    """
    free = cpus - TASKS * TASK_CPUS
    if not generating:
        scorers = pipeline.scorers or max(1, int(cpus))
        return StageResources(0, 0.0, 0.0, 1, scorers, min(1.0, _floor(free / scorers)))
    generators = pipeline.generators
    scorers = pipeline.scorers or max(1, int((cpus - generators) / 2))
    left = (free - scorers * SCORER_CPUS_BESIDE_GENERATORS) / generators
    # On GPUs a generator needs one CPU to drive its device; on CPUs it computes with whatever is there.
    gpu_share = float(generate.tensor_parallel_size) if gpus else 0.0
    generator_gpus = gpu_share if pipeline.generator_gpus is None else pipeline.generator_gpus
    generator_cpus = pipeline.generator_cpus or _floor(min(left, 1.0) if generator_gpus else left)
    asked = generators * generator_cpus + scorers * SCORER_CPUS_BESIDE_GENERATORS + TASKS * TASK_CPUS
    if generator_cpus <= 0 or asked > cpus + 1e-6 or generators * generator_gpus > gpus:
        raise UserError(
            f"pipeline: {generators} generators with {max(generator_cpus, 0):g} CPUs and {generator_gpus:g} GPUs each and "
            f"{scorers} scorers do not fit into {cpus:g} CPUs and {gpus:g} GPUs; ask for fewer"
        )
    threads = pipeline.generator_threads or max(1, int(cpus // generators))
    return StageResources(generators, generator_cpus, generator_gpus, threads, scorers, SCORER_CPUS_BESIDE_GENERATORS)


def _floor(value: float) -> float:
    """Cut to two decimals, so that fractions add up to no more than there is."""
    return int(value * 100 + 1e-6) / 100


class Noted(Protocol):
    """Something that prints a line."""

    def note(self, text: str) -> None:
        """Print a line that stays."""
        ...


class PartProgress:
    """Says how a stage gets on, at most every few seconds and at its end."""

    def __init__(self, view: Noted, *, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Prepare; `seconds` lie between two lines, `clock` is steady."""
        self._view, self._seconds, self._clock = view, seconds, clock

    def note(self, text: str) -> None:
        """Print a line."""
        self._view.note(text)

    def rows(self, text: str, total: int) -> Callable[[int], None]:
        """Return what a stage tells of each part that is done."""
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
