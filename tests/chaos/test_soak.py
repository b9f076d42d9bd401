"""Kills at random instants, start-up and loading included, in four kinds of runs; each ends as its undisturbed twin does.

`RAYRLHF_SOAK_KILLS=60 pytest -m nightly -s tests/chaos/test_soak.py` (60 is the default) spreads the kills over the runs; a few
take minutes, sixty most of an hour on two cores.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from rayrlhf.config.loading.load import dump_config
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.observe.samples import read_samples
from tests.chaos.arena import ROOT, repeatable
from tests.chaos.duel import SETTINGS
from tests.pipelines.presft.runs import presft_config
from tests.ppo.runs import run_config
from tests.tuning.runs import sft_config

KILLS = int(os.environ.get("RAYRLHF_SOAK_KILLS", "60"))
SHARES = {"sync": 0.4, "async": 0.2, "sft": 0.2, "presft": 0.2}
"""Share of the kills in each run."""
DRIVER_KILLS = 3
"""Kills of the driver, at least, in each run with as many kills."""
PROMPTS, EVERY_STEP = 32, 4
PPO = [*SETTINGS, "recovery.attempts=99", "deadlines.start=240"]
ASYNC = [setting for setting in PPO if not setting.startswith(("run.determinism", "recovery.snapshot", "rollout.replicas"))]
AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
"""Processes of Ray itself with the title of an actor."""
WANTED = {"presft": [("", 4), ("MapWorker", 99)]}
"""Part of the titles of the actors that are killed, by kind of run, and the number of kills. Elsewhere any actor is.

A restart of Pre-SFT begins with a training stage, so that kills of any actor would seldom reach a generator or scorer.
"""
LIMIT = 3000
"""Seconds for all kills of one run and its end."""


def kills(name):
    return max(round(KILLS * SHARES[name]), 1)


class Victim:
    """A command that is started again, as a scheduler would, until it ends by itself."""

    def __init__(self, name, command, folder):
        self.name, self.folder = name, folder
        self.hurts, self.starts = [], 0
        self._command, self._log = command, folder / "log.txt"
        self.driver = None

    def start(self):
        self.starts += 1
        with self._log.open("ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "rayrlhf.cli", *self._command],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )

    def actors(self):
        """The run's processes that hold an actor to be killed next, with their titles; none while Ray starts."""
        found, done = [], len(self.hurts)
        wanted = next((part for part, count in WANTED.get(self.name.split()[0], ()) if done < count), "")
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.driver.pid).children(recursive=True):
                with suppress(psutil.Error):
                    title = " ".join(process.cmdline()).partition(" ")[0].partition(".")[0]
                    if title.startswith("ray::") and title != "ray::IDLE" and title not in AGENTS and wanted in title:
                        found.append((title, process))
        return sorted(found, key=lambda one: one[1].pid)

    def wait_for_actor(self):
        """Wait until there is an actor, loaded or still loading, or the driver has ended."""
        while self.driver.poll() is None and not self.actors():
            time.sleep(0.1)

    def hurt(self, generator, *, driver):
        """Kill the driver, or one of the actors."""
        try:
            title, process = ("driver", self.driver) if driver else generator.choice(self.actors())
            process.send_signal(signal.SIGKILL)
        except (psutil.NoSuchProcess, IndexError):
            return
        if title == "driver":
            self.driver.wait(60)
        self.hurts.append(title)

    def soak(self, count, generator):
        """Let it run to its end, with kills at random instants: soon after a start or a kill, or anywhere in a while."""
        end, since = time.monotonic() + LIMIT, 0.0
        drivers = set(generator.sample(range(count), min(DRIVER_KILLS, count)))
        while True:
            code = None if self.driver is None else self.driver.poll()
            if code == 0:
                return self
            assert time.monotonic() < end, self.tail
            assert self.starts <= 2 * count + 2, self.tail
            if code is not None or self.driver is None:
                self.start()
                since = time.monotonic()
            if len(self.hurts) == count:
                time.sleep(0.2)
                continue
            driver = len(self.hurts) in drivers
            if not driver:
                self.wait_for_actor()
            time.sleep(generator.random() * generator.choice([1.0, 8.0, 20.0]))
            if self.driver.poll() is None:
                print(f"{self.name}: kill {len(self.hurts) + 1} of {count}, {time.monotonic() - since:.0f} s after the start")
                self.hurt(generator, driver=driver)

    @property
    def tail(self):
        return self._log.read_text(errors="replace")[-3000:]


def pair(folder, name, command, make):
    """The undisturbed twin and the victim, both at their end."""
    both = []
    for kind, count in (("twin", 0), ("victim", kills(name))):
        own = folder / kind
        own.mkdir()
        config = make(own)
        (own / "run.yaml").write_text(dump_config(config))
        run = Victim(f"{name} {kind}", [*command, str(own / "run.yaml")], own)
        run.config = config
        both.append(run.soak(count, random.Random(count)))
    twin, victim = both
    print(f"{name}: {victim.starts} starts, kills {dict(Counter(victim.hurts))}")
    assert twin.starts == 1
    assert len(victim.hurts) == kills(name)
    assert "Traceback" not in victim.tail
    return twin.config.run.folder, victim.config.run.folder


def steps_of(folder):
    return [row for row in read_metrics(folder) if "lr" in row]


def samples_of(folder, *keys):
    return [tuple(row[key] for key in keys) for row in read_samples(folder / "samples")]


@pytest.mark.nightly
@pytest.mark.timeout(2 * LIMIT)
def test_a_synchronous_run_has_the_metrics_samples_and_weights_of_its_twin(tmp_path):
    steps = EVERY_STEP * kills("sync") + 4
    twin, victim = pair(tmp_path, "sync", ["ppo"], lambda folder: run_config(folder, *PPO, f"run.steps={steps}"))
    assert [row["step"] for row in steps_of(victim)] == list(range(1, steps + 1))
    assert [repeatable(row) for row in steps_of(victim)] == [repeatable(row) for row in steps_of(twin)]
    keys = ("step", "prompt_id", "sample", "response", "score")
    assert samples_of(victim, *keys) == samples_of(twin, *keys)
    assert (victim / "export" / "model.safetensors").read_bytes() == (twin / "export" / "model.safetensors").read_bytes()


@pytest.mark.nightly
@pytest.mark.timeout(2 * LIMIT)
def test_an_asynchronous_run_trains_on_every_prompt_of_its_twin_once(tmp_path):
    steps = EVERY_STEP * kills("async") + 4
    settings = [*ASYNC, "async.max_staleness=1", f"run.steps={steps}"]
    twin, victim = pair(tmp_path, "async", ["ppo"], lambda folder: run_config(folder, *settings))
    assert [row["step"] for row in steps_of(victim)] == list(range(1, steps + 1))
    trained = [Counter(prompt for (prompt,) in samples_of(folder, "prompt_id")) for folder in (twin, victim)]
    assert trained[0] == trained[1] == Counter(dict.fromkeys(range(PROMPTS), steps))
    assert len(set(samples_of(victim, "step", "prompt_id", "sample"))) == steps * PROMPTS
    assert all(row["sampling/staleness/max"] <= 1 for row in steps_of(victim))


@pytest.mark.nightly
@pytest.mark.timeout(2 * LIMIT)
def test_an_sft_run_has_the_losses_and_the_model_of_its_twin(tmp_path):
    steps = 200 * kills("sft")
    settings = [f"train.steps={steps}", "checkpoint.every=20", "evaluation.generations=0", "workers.max_failures=99"]
    twin, victim = pair(tmp_path, "sft", ["sft"], lambda folder: sft_config(folder, *settings))
    losses = [[row["loss"] for row in read_metrics(folder) if "loss" in row] for folder in (twin, victim)]
    assert len(losses[0]) == steps
    np.testing.assert_array_equal(*losses)
    assert (victim / "export" / "model.safetensors").read_bytes() == (twin / "export" / "model.safetensors").read_bytes()


def parts_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(Path(folder).rglob("part-*.parquet"))}


@pytest.mark.nightly
@pytest.mark.timeout(2 * LIMIT)
def test_a_presft_run_has_the_rows_and_the_dataset_of_its_twin(tmp_path):
    settings = ["probe.temperature=1.0", "select.rule=quantile", "select.value=0.4", "relabel.method=mbr", "relabel.samples=3"]
    settings += ["train.steps=20", "workers.max_failures=99", "pipeline.max_restarts=99"]
    make = lambda folder: presft_config(folder, *settings, count=400 * kills("presft"))  # noqa: E731
    twin, victim = pair(tmp_path, "presft", ["presft", "run"], make)
    assert parts_of(twin)
    assert parts_of(victim) == parts_of(twin)
    sheets = [json.loads((folder / "datasheet.json").read_text()) for folder in (twin, victim)]
    assert sheets[0].keys() == sheets[1].keys()
