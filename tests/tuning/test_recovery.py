"""A training worker is killed: the run goes on from its last committed checkpoint, and ends where it would have ended."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import cache

import numpy as np
import psutil
import pytest

from rayrlhf.config.loading.load import dump_config
from rayrlhf.observe.journal import read_journal
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.tuning.train_model import train_sft
from tests.tuning.runs import sft_config

TOLERANCE = 1e-5
STEPS, EVERY, KILL_AFTER = 160, 20, 50

pytestmark = pytest.mark.usefixtures("cluster")


def losses(folder):
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


def train_workers():
    """Processes of Ray Train's workers below this one's Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return sorted(found)


def kill_one_after(folder, step, killed):
    while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < step:
        time.sleep(0.01)
    killed.append(len(losses(folder)))
    os.kill(train_workers()[0], signal.SIGKILL)


def settings_of(workers, stage):
    settings = [f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "evaluation.generations=0", "train.learning_rate=1e-4"]
    return [*settings, f"workers.count={workers}", f"train.zero_stage={stage}"]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """Returns the undisturbed run of a number of workers and a ZeRO stage, which two tests share."""
    folder = tmp_path_factory.mktemp("quiet")

    @cache
    def train(workers, stage):
        return train_sft(sft_config(folder, *settings_of(workers, stage), f"run.name=quiet-{stage}-{len(str(workers))}"))

    return train


@pytest.mark.parametrize(
    ("workers", "stage"),
    [
        pytest.param(2, 0, marks=pytest.mark.slow),
        pytest.param("[1, 2]", 0, marks=pytest.mark.nightly),
        pytest.param("[1, 2]", 2, marks=pytest.mark.nightly),
    ],
)
def test_a_run_that_lost_a_worker_ends_with_the_losses_of_an_undisturbed_one(tmp_path, quiet, workers, stage):
    disturbed = sft_config(tmp_path, *settings_of(workers, stage), "run.name=disturbed")
    expected = quiet(workers, stage)
    killed = []
    killer = threading.Thread(target=kill_one_after, args=(disturbed.run.folder, KILL_AFTER, killed), daemon=True)
    killer.start()
    result = train_sft(disturbed)
    killer.join()
    assert killed
    assert killed[0] < STEPS
    # Workers of a process group that waited for the one that was killed are lost with it.
    lost = [event["actor"] for event in read_journal(disturbed.run.folder) if event["event"] == "lost"]
    assert lost
    assert set(lost) <= {"disturbed/worker/0", "disturbed/worker/1"}
    np.testing.assert_allclose(losses(result.folder), losses(expected.folder), rtol=0, atol=TOLERANCE)
    assert result.metrics["evaluation/loss"] == pytest.approx(expected.metrics["evaluation/loss"], abs=TOLERANCE)


@pytest.mark.slow
def test_a_run_that_was_asked_to_stop_goes_on_when_it_is_started_again(tmp_path, quiet):
    config = sft_config(tmp_path, *settings_of(2, 0), "run.name=stopped")
    path = tmp_path / "sft.yaml"
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "rayrlhf.cli", "sft", str(path)]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (config.run.folder / "metrics.jsonl").exists() or len(losses(config.run.folder)) < KILL_AFTER:
        assert first.poll() is None
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGTERM)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 75, errors
    done = len(losses(config.run.folder))
    assert (
        errors.strip().splitlines()[-1]
        == f"rayrlhf: stopped after step {done} on SIGTERM, with a checkpoint; the same command resumes"
    )
    assert done < STEPS
    assert (config.run.folder / "checkpoints" / "train" / f"step-{done:06d}").is_dir()
    subprocess.run(command, check=True, timeout=300)
    np.testing.assert_allclose(losses(config.run.folder), losses(quiet(2, 0).folder), rtol=0, atol=TOLERANCE)
