"""kill -9 of a generator, a scorer or the driver loses no row, doubles none, and changes no byte of the result."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rayrlhf.batch_inference.part_pipeline import Limits, Pool, run_pipeline
from rayrlhf.pipelines.presft.presft_steps import LabeledModel, _plan
from tests.pipelines.presft.killing import HOLD, ROWS, SlowProber, SlowScorer, prepare

pytestmark = pytest.mark.slow


def content(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.parquet"))}


def wait_for(condition, seconds=240.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing to kill came up"
        time.sleep(0.02)


def stages(folder, config):
    plan = _plan(config, LabeledModel("tuned", config.model), 2, 1, 1.0)
    generator = Pool("probe", SlowProber, (folder, plan), 1, 0.9, environment={"OMP_NUM_THREADS": "1"})
    return [generator, Pool("score", SlowScorer, (folder, config.probe, config.data, plan), 1, 0.25)]


def score(folder, victim=None):
    """Score all rows; kill the victim's process once two parts are written. Returns the parts and the processes there were."""
    folder.mkdir()
    config, layout = prepare(folder)
    scores = layout.round(1).scores
    written = []

    def kill():
        wait_for(lambda: len(scores.indices()) >= 2)
        os.kill(int((folder / f"{victim}.pids").read_text().split()[0]), signal.SIGKILL)
        (folder / HOLD).unlink()

    killer = threading.Thread(target=kill, daemon=True)
    if victim is not None:
        (folder / HOLD).touch()
        killer.start()
    run_pipeline(layout.rows, scores, stages(folder, config), Limits(5, 120.0), written.append)
    if victim is not None:
        killer.join(10)
    processes = {name: (folder / f"{name}.pids").read_text().split() for name in ("generator", "scorer")}
    return scores, written, processes


@pytest.mark.usefixtures("small_ray")
def test_a_killed_generator_or_scorer_is_replaced_and_its_part_done_once(tmp_path):
    undisturbed, _, _ = score(tmp_path / "undisturbed")
    expected = content(undisturbed.path)
    assert [row["row"] for row in undisturbed.rows()] == list(range(ROWS))
    for victim in ("generator", "scorer"):
        scores, written, processes = score(tmp_path / victim, victim)
        assert len(processes[victim]) == 2, f"the {victim} was not killed in the middle"
        assert sum(written) == ROWS, "a part was written twice, or not at all"
        assert content(scores.path) == expected


def drive(folder):
    return subprocess.Popen([sys.executable, "-m", "tests.pipelines.presft.killing", str(folder)])


def test_a_killed_driver_goes_on_where_it_stopped_and_leaves_the_same_bytes(tmp_path):
    twin, killed = tmp_path / "twin", tmp_path / "killed"
    for folder in (twin, killed):
        folder.mkdir()
    assert drive(twin).wait(240) == 0
    stops = [("scores", 2), ("relabeled", 1)]
    for stage, parts in stops:
        process = drive(killed)
        folder = killed / "run" / "round-1" / stage
        wait_for(lambda folder=folder, parts=parts: len(list(folder.glob("part-*.parquet"))) >= parts)
        assert process.poll() is None, "the driver was done before it could be killed"
        process.kill()
        process.wait()
        # What was there is neither lost nor written again.
        before = {file: file.stat().st_mtime_ns for file in folder.glob("part-*.parquet")}
        assert len(before) < ROWS // 16
        time.sleep(2)  # Ray's processes see that their driver is gone.
    assert drive(killed).wait(240) == 0
    assert all(file.stat().st_mtime_ns == modified for file, modified in before.items())
    assert content(killed / "run") == content(twin / "run")
    assert not list((killed / "run").rglob(".*.partial"))
