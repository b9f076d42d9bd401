"""Memory limit for user code: its allocations fail before the node runs out of memory."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from rayrlhf.config.section import GIB


@contextmanager
def memory_limit(gib: float | None) -> Iterator[None]:
    """Limit the growth of this process's private memory to `gib` GiB inside the block.

    At the limit Python raises `MemoryError`, torch a `RuntimeError`. Mapped but unused memory counts as well, and so do
    allocations of other threads. None is no limit.
    """
    if gib is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = int(psutil.Process().memory_info().data + gib * GIB)
    if soft != resource.RLIM_INFINITY:
        bound = min(bound, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
