"""A run that is stopped or killed and started again gives what the run would have given, bit for bit."""

import signal
from pathlib import Path

import psutil
import pytest

from rayrlhf.observe.samples import read_samples
from tests.chaos.arena import Job, repeatable, shared_memory

SETTINGS = [
    "rollout.backend=transformers",
    "rollout.replicas=2",
    "run.determinism=exact",
    "run.steps=16",
    "checkpoint.every=2",
    "observe.samples_per_step=16",
    "evaluation.enabled=false",
]

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The undisturbed run."""
    job = Job(tmp_path_factory.mktemp("twin"), *SETTINGS).start()
    assert job.wait(400) == 0, job.log[-3000:]
    return job


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Killed after step 3 (one step beyond its checkpoint), asked to stop a step later, and finished by a third start."""
    job = Job(tmp_path_factory.mktemp("resumed"), *SETTINGS).start()
    job.wait_for_step(3, 400)
    processes = job.processes()
    shared = shared_memory(processes)
    job.driver.kill()
    job.driver.wait(30)
    job.left = processes, shared
    reached = job.steps()[-1]["step"]  # a fast run is some steps further by now
    job.start()
    job.wait_for_step(reached + 1, 400)
    job.hurt("driver", signal.SIGTERM)
    job.stop_code = job.wait(100)
    job.stop_log = job.log
    job.start()
    assert job.wait(400) == 0, job.log[-3000:]
    return job


def test_a_killed_and_a_stopped_run_end_with_the_metrics_of_the_undisturbed_one_bit_for_bit(twin, resumed):
    assert [row["step"] for row in resumed.steps()] == list(range(1, 17))
    for mine, other in zip(resumed.steps(), twin.steps(), strict=True):
        assert repeatable(mine) == repeatable(other)
        assert mine["policy/weights_checksum"] != 0


def test_the_checksum_of_the_weights_moves_with_every_step(twin):
    checksums = [row["policy/weights_checksum"] for row in twin.steps()]
    assert len(set(checksums)) == len(checksums)


def test_every_sample_of_the_undisturbed_run_is_there_once_with_the_same_tokens_and_score(twin, resumed):
    def rows(job):
        keys = ("step", "prompt_id", "sample", "response", "score")
        return [tuple(row[key] for key in keys) for row in read_samples(job.folder / "samples")]

    assert rows(twin) == rows(resumed)
    assert len(set(rows(twin))) == 16 * 16


def test_sigterm_ends_with_code_75_a_line_that_says_how_to_go_on_and_a_checkpoint(resumed):
    assert resumed.stop_code == 75
    assert "on SIGTERM; the same command resumes" in resumed.stop_log
    assert "Traceback" not in resumed.log


def test_nothing_of_a_killed_driver_is_left_alive_or_in_shared_memory(resumed):
    processes, shared = resumed.left
    assert processes
    # Ray's own agents look for their raylet about once a minute; everything of ours is gone within seconds.
    assert psutil.wait_procs(processes, timeout=90)[1] == []
    assert shared_memory(processes) == set()
    assert not [path for path in shared if Path(path).exists()]
