"""A bound on what user code may allocate: beyond it the allocation fails there, instead of the node running out of memory."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

GIB = 2**30


@contextmanager
def memory_limit(gib: float | None) -> Iterator[None]:
    """Let this process hold at most `gib` GiB of private memory more than it does now, inside the block.

    Python raises `MemoryError` where the bound is hit, torch a `RuntimeError`. Memory that is mapped and not yet used counts
    as well, and so do allocations of other threads meanwhile. None is no bound.
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
