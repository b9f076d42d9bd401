"""`rayrlhf bench sync`: weight sync compared with a memory copy and with transport alone.

The transport is everything except vLLM's loading: the policy's stream of buckets, the object store, and a reader that touches
every page of it, in one process and in four. Reading every byte is part of loading, and would measure cores, not transport.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import ray

from rayrlhf.actors.remote import Ref
from rayrlhf.ppo.step_driver import StepDriver
from rayrlhf.tools.bench.paired import Comparison, compare
from rayrlhf.tools.bench.work import bench_config, running_trainer
from rayrlhf.weight_sync.buckets import SharedTensor
from rayrlhf.weight_sync.object_store import BUCKET_BYTES

READERS = 4
PAGE = 4096
"""Bytes of a memory page, or a part of one."""
COPY, ONE, MANY, WHOLE = (
    "copy in memory",
    "transport to 1 reader",
    f"transport to {READERS} readers",
    "weight sync to 1 replica",
)


def bench_sync(model: str, *, rounds: int, progress: Callable[[str], None] = lambda _: None) -> Comparison:
    """Measure the throughput of each method.

    Returns:
        MiB of weights per second, with a plain copy as the baseline. Seconds are in the title.
    """
    config = bench_config([f"model.path={model}", "rollout={max_new_tokens: 8, max_model_length: 128, memory_gib: 0.25}"])
    with running_trainer(config) as trainer:
        readers = [ray.remote(Reader).options(num_cpus=0).remote() for _ in range(READERS)]
        measured = _Measured(trainer, readers)
        size = measured.measure_size()
        contenders: dict[str, Callable[[], float]] = {
            COPY: lambda: _copy(size),
            ONE: lambda: size / measured.transport(1),
            MANY: lambda: size / measured.transport(READERS),
            WHOLE: lambda: size / measured.sync(),
        }
        for warm in contenders.values():
            warm()
        mib = {name: (lambda run=run: run() / 2**20) for name, run in contenders.items()}
        title = f"weight sync of {model}: {size / 2**20:,.0f} MiB of {trainer.sync_dtype}"
        found = compare(title, "MiB/s", mib, rounds, progress)
    seconds = {name: size / 2**20 / found.median(name) for name in contenders}
    words = ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
    return Comparison(f"{title}; medians: {words}", found.unit, found.speeds)


class Reader:
    """A replica without a model."""

    def receive(self, bucket: list[SharedTensor]) -> float:
        """Read a byte of every page."""
        return float(sum(float(tensor.data.reshape(-1).view(np.uint8)[::PAGE].max()) for tensor in bucket))

    def ready(self) -> None:
        """Return once all earlier buckets are read."""


@dataclass(frozen=True)
class _Measured:
    trainer: StepDriver
    readers: list[ray.actor.ActorHandle]

    def sync(self) -> float:
        """Return the seconds of a whole sync."""
        return self.trainer.sync(self.trainer.weight_version + 1).seconds

    def transport(self, readers: int) -> float:
        """Return the seconds until this number of readers have read everything."""
        started = time.perf_counter()
        for bucket in self._buckets():
            for reader in self.readers[:readers]:
                reader.receive.remote(bucket)
        ray.get([reader.ready.remote() for reader in self.readers[:readers]])
        return time.perf_counter() - started

    def measure_size(self) -> int:
        """Return the bytes of all buckets."""
        return sum(tensor.data.nbytes for bucket in self._buckets() for tensor in ray.get(bucket))

    def _buckets(self) -> Iterator[Ref[list[SharedTensor]]]:
        return self.trainer.actor_groups["policy"].weights(BUCKET_BYTES, self.trainer.sync_dtype)


def _copy(size: int) -> float:
    """Return bytes per second of a copy between two preallocated, touched arrays."""
    source, target = np.ones(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    started = time.perf_counter()
    np.copyto(target, source)
    return size / (time.perf_counter() - started)
