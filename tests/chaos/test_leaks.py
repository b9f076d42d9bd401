"""What a run leaves on a cluster that stays: nothing, whether it ended or its driver was killed."""

import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.chaos.arena import PLACED, Job, nothing_left, shared_memory


class Belongings(NamedTuple):
    """What a run has on a cluster besides actors and placement groups."""

    processes: list[psutil.Process]
    shared: set[str]


def belongings(job, cluster, before):
    """Look at a run that is under way: its actors, everything below them, and the shared memory that is theirs alone."""
    assert cluster.ask("left")["groups"]
    actors = [process for role in ("rollout", "policy", "reward", "reference") for process in job.actors(role)]
    assert len(actors) >= 4
    processes = [*actors, *(child for process in actors for child in process.children(recursive=True))]
    stores = shared_memory([process for process in before if process.name().startswith("raylet")])
    return Belongings(processes, shared_memory(processes) - stores)


def gone(theirs, cluster, seconds=30):
    """Wait until nothing of a run is left; what is left is in the error."""
    assert nothing_left(cluster, seconds)
    assert psutil.wait_procs(theirs.processes, timeout=seconds)[1] == []
    end = time.monotonic() + seconds
    while left := [path for path in theirs.shared if Path(path).exists()]:
        assert time.monotonic() < end, left
        time.sleep(0.5)
    return True


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "backend", [pytest.param("vllm", marks=pytest.mark.slow), pytest.param("transformers", marks=pytest.mark.nightly)]
)
def test_neither_a_run_nor_its_killed_driver_leaves_actors_groups_engines_or_shared_memory(tmp_path, cluster, backend):
    settings = [f"rollout.backend={backend}", "checkpoint.every=0", "evaluation.enabled=false", "critic.kind=shared", *PLACED]
    before = set(psutil.Process(cluster.pid).children(recursive=True))
    ended = Job(tmp_path / "ended", *settings, "run.steps=30", cluster=cluster).start()
    assert ended.wait_for_step(2, 400)
    theirs = belongings(ended, cluster, before)
    assert ended.wait(100) == 0, ended.log[-3000:]
    assert gone(theirs, cluster)
    killed = Job(tmp_path / "killed", *settings, "run.steps=500", cluster=cluster).start()
    assert killed.wait_for_step(2, 400)
    theirs = belongings(killed, cluster, before)
    killed.hurt("driver")
    assert killed.driver.wait(30) != 0
    assert gone(theirs, cluster)
