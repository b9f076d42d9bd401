"""Peak memory over real processes."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import shared_memory

import psutil
import pytest

from rayrlhf.observe.memory import PeakMemory, memory_bytes, process_tree

MIB = 2**20
TAKE = """
import sys, time
data = bytearray(int(sys.argv[1]))
data[::4096] = b"x" * len(data[::4096])
print(flush=True)
time.sleep(60)
"""
LEAVE_BEHIND = """
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-S", "-c", *sys.argv[1:]], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
)
child.stdout.readline()
print(child.pid)
"""


def start_child(size: int) -> subprocess.Popen:
    child = subprocess.Popen([sys.executable, "-S", "-c", TAKE, str(size)], stdout=subprocess.PIPE)
    child.stdout.readline()
    return child


@pytest.fixture(autouse=True)
def without_older_children(monkeypatch):
    """Leave out children that earlier tests of this process left running, such as a Ray cluster that is ending."""
    older = {pid for pid, _ in process_tree([os.getpid()])} - {os.getpid()}
    monkeypatch.setattr(
        "rayrlhf.observe.memory.process_tree", lambda pids: [found for found in process_tree(pids) if found[0] not in older]
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end(child: subprocess.Popen) -> None:
    child.kill()
    child.wait()
    child.stdout.close()


def test_a_childs_memory_counts_also_after_it_is_gone(monkeypatch):
    # A test process of several GiB takes seconds for one reading: the pause after it outlasted the test.
    monkeypatch.setattr("rayrlhf.observe.memory.MAX_TIME_SHARE", 1.0)
    with PeakMemory(interval_seconds=0.05) as memory:
        before = memory.peak_bytes
        child = start_child(100 * MIB)
        wait_until(lambda: memory.peak_bytes > before + 100 * MIB)
        end(child)
    assert 100 * MIB < memory.peak_bytes - before < 130 * MIB


def read_all(name: str, ready: object, done: object) -> None:
    block = (
        shared_memory.SharedMemory(name=name, track=False) if sys.version_info >= (3, 13) else shared_memory.SharedMemory(name)
    )
    assert sum(block.buf[::4096]) >= 0
    ready.release()
    done.wait(30)
    block.close()


def test_shared_memory_counts_once_however_many_processes_map_it():
    # Large next to the pages that forked readers of a big test process copy on their first writes (44 MiB in one CI run).
    size = 256 * MIB
    block = shared_memory.SharedMemory(create=True, size=size)
    context = multiprocessing.get_context("fork")
    ready, done = context.Semaphore(0), context.Event()
    block.buf[::4096] = b"x" * (size // 4096)
    readers = [context.Process(target=read_all, args=(block.name, ready, done)) for _ in range(3)]
    try:
        alone = PeakMemory().sample()
        resident_alone = psutil.Process().memory_info().rss
        for reader in readers:
            reader.start()
        for _ in readers:
            assert ready.acquire(timeout=30)
        together = PeakMemory().sample()
        resident_together = sum(psutil.Process(pid).memory_info().rss for pid, _ in process_tree([os.getpid()]))
    finally:
        done.set()
        for reader in readers:
            reader.join()
        block.close()
        block.unlink()
    assert together - alone < size / 2
    assert resident_together - resident_alone > 3 * size * 0.9  # what adding up resident sizes would have said


def test_a_process_that_is_gone_counts_nothing():
    child = start_child(MIB)
    end(child)
    assert memory_bytes(child.pid) == 0
    assert process_tree([child.pid]) == []


def test_watching_a_run_that_does_not_grow_reads_the_costly_sizes_only_a_few_times():
    with PeakMemory(interval_seconds=0.01) as memory:
        time.sleep(1.0)
    assert 2 <= memory.samples <= 5
