"""A small real PPO job as a subprocess, with everything needed to hurt it and to look at what it leaves.

The victim is the command line itself: a driver that is killed is started again with the same command, as a scheduler would.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from rayrlhf.config.loading.load import dump_config
from rayrlhf.observe.metrics import read_metrics
from rayrlhf.observe.stacks import process_stacks
from tests.ppo.runs import run_config

ROOT = Path(__file__).parents[2]
ACTOR_CLASSES = {
    "policy": "PolicyActor",
    "critic": "CriticActor",
    "reference": "ReferenceActor",
    "reward": "RewardActor",
    "rollout": "RolloutActor",
}
PLACED = [
    "placement.mode=disaggregated",
    *(f"placement.{role}={{cpus: 1, labels: {{rayrlhf/role: train}}}}" for role in ("policy", "critic", "reference")),
    "placement.reward={cpus: 0.5, labels: {rayrlhf/role: rollout}}",
    "placement.rollout_cpus=1",
    "placement.rollout_labels={rayrlhf/role: rollout}",
    "deadlines.start=120",
]
"""Settings of a job on a standing cluster: what trains on one of its nodes, what samples and scores on the other."""
NOT_REPEATABLE = ("time", "speed/", "memory/", "sync/seconds", "sampling/", "rollout/")
"""Metrics that say how long something took, or what the sampler thought of its own tokens."""


class StandingCluster:
    """A cluster of its own process (`tests.chaos.two_nodes`), which outlives the drivers that come to it."""

    def __init__(self, **environment):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.two_nodes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        )
        self.pid = self._process.pid
        self.environment = environment
        self.address = self._answer()

    def ask(self, *command):
        """Give a command of `tests.chaos.two_nodes`; returns its answer."""
        self._process.stdin.write(" ".join(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self):
        """Let it shut down; what is still there after a minute is killed."""
        own = psutil.Process(self.pid)
        members = [own, *own.children(recursive=True)]
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            for process in psutil.wait_procs(members, timeout=5)[1]:
                process.kill()

    def _answer(self):
        line = self._process.stdout.readline()
        assert line, "the cluster has ended"
        return json.loads(line)


class Job:
    """One run: `start` it, hurt it, `wait` for it, look at its folder. Its actors are the driver's or a cluster's children."""

    def __init__(self, folder, *overrides, cluster=None):
        folder.mkdir(parents=True, exist_ok=True)
        self.cluster = cluster
        placed = [f"placement.address='{cluster.address}'"] if cluster else []
        self.config = run_config(folder, *placed, *overrides)
        self.folder = self.config.run.folder
        self._yaml = folder / "run.yaml"
        self._yaml.write_text(dump_config(self.config))
        self._log = folder / "log.txt"
        self.driver = None

    def start(self):
        command = [str(Path(sys.executable).with_name("rayrlhf")), "ppo", str(self._yaml)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | (self.cluster.environment if self.cluster else {})
        with self._log.open("ab") as log:
            self.driver = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True)
        return self

    def wait(self, seconds):
        """The exit code; a driver that is still there after `seconds` is ended and fails the test."""
        try:
            return self.driver.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"the run did not end within {seconds} s:\n{self.log[-3000:]}") from None

    def end(self):
        own = psutil.Process(self.driver.pid) if self.driver.poll() is None else None
        for process in [*own.children(recursive=True), own] if own else []:
            process.kill()
        self.driver.wait(30)

    @property
    def log(self):
        return self._log.read_text(errors="replace")

    def processes(self):
        """Everything the driver or the cluster started, Ray's own processes included."""
        root = self.cluster.pid if self.cluster else self.driver.pid
        return psutil.Process(root).children(recursive=True)

    def actors(self, role):
        """Processes of one role, which Ray titles `ray::ClassName` and, while they work, `ray::ClassName.method`."""
        title = f"ray::{ACTOR_CLASSES[role]}"
        found = []
        for process in self.processes():
            try:
                if process.cmdline() and process.cmdline()[0].startswith(title) and process.status() != psutil.STATUS_STOPPED:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return sorted(found, key=lambda process: process.pid)

    def steps(self):
        """Whole PPO steps in the metrics file."""
        return [row for row in read_metrics(self.folder) if "lr" in row] if self.folder.exists() else []

    def wait_for_step(self, step, seconds):
        """Wait until a step's metrics are written; False when the run ended first."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if any(row["step"] >= step for row in self.steps()):
                return True
            if self.driver.poll() is not None:
                return False
            time.sleep(0.1)
        raise AssertionError(f"step {step} was not reached within {seconds} s:\n{self.log[-3000:]}")

    def hurt(self, role, kind=signal.SIGKILL, seconds=60):
        """Send a signal to one process of a role, as soon as there is one, or to the driver's group; returns its number."""
        if role == "driver":
            os.killpg(self.driver.pid, kind)
            return self.driver.pid
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.driver.poll() is None:
            found = self.actors(role)
            if found:
                found[-1].send_signal(kind)
                return found[-1].pid
            time.sleep(0.2)
        raise AssertionError(f"no process of the {role}:\n{self.log[-3000:]}")


def repeatable(row):
    """The part of a step's metrics that two runs must agree on bit for bit."""
    return {name: value for name, value in row.items() if not name.startswith(NOT_REPEATABLE)}


def shared_memory(processes):
    """Paths under /dev/shm that some processes have mapped."""
    paths = set()
    for process in processes:
        try:
            paths |= {mapped.path for mapped in process.memory_maps() if mapped.path.startswith("/dev/shm/")}
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return {path.removesuffix(" (deleted)") for path in paths if Path(path).exists()}


def nothing_left(cluster, seconds=30):
    """Wait until a standing cluster has neither actor nor placement group; what there is is in the error."""
    end = time.monotonic() + seconds
    while (left := cluster.ask("left")) != {"groups": [], "actors": []}:
        assert time.monotonic() < end, left
        time.sleep(0.5)
    return True


def reads_stacks():
    """True where the system lets a process read the stacks of a stopped one."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGSTOP)
        found = process_stacks(process.pid)
        process.kill()
    return bool(found)
