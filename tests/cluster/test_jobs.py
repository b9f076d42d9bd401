"""A real cluster of three nodes on this machine, with tokens: runs go in as jobs, stop, resume, and strangers stay out."""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import yaml

from rayrlhf.observe.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS = 60
RUN = {
    "run": {"name": "job", "steps": STEPS},
    "model": {"path": "builtin:tiny?layers=1&hidden=64&context=64", "dtype": "float32"},
    "critic": {"kind": "shared"},
    "reward": {"functions": [{"name": "length", "arguments": {"soft_limit": 1, "hard_limit": 4}}]},
    "data": {"train": {"path": "prompts.jsonl"}},
    "rollout": {"backend": "transformers", "prompts_per_step": 8, "max_new_tokens": 4, "max_model_length": 64},
    "algorithm": {"kl": {"coefficient": 0}},
    "evaluation": {"enabled": False},
    "checkpoint": {"every": 0},
    "observe": {"live": False, "tensorboard": False},
    "placement": {
        "mode": "disaggregated",
        "policy": {"cpus": 1, "labels": {"rayrlhf/role": "train"}},
        "reward": {"cpus": 0.5},
        "rollout_cpus": 1,
        "rollout_labels": {"rayrlhf/role": "rollout"},
    },
}


class Bench:
    """A running cluster and a folder with a run in it."""

    def __init__(self, folder, port, environment, nodes, token):
        self.folder, self.environment, self.nodes, self.token = folder, environment, nodes, token
        self.url = f"http://127.0.0.1:{port}"
        self.run = folder / "kept" / "runs" / "job"

    def start(self, *command, **environment):
        return subprocess.Popen(
            command,
            cwd=self.folder / "work",
            env=self.environment | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def call(self, *command, **environment):
        process = self.start(*command, **environment)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def actors(self):
        """Node of every actor that ever was, by its class."""
        reply = requests.get(
            f"{self.url}/api/v0/actors?limit=200&detail=true",
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=30,
        )
        reply.raise_for_status()
        return {(item["class_name"], item["node_id"]) for item in reply.json()["data"]["result"]["result"]}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    work = folder / "work"
    work.mkdir()
    (work / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {index}"}) + "\n" for index in range(16)))
    (work / "run.yaml").write_text(yaml.safe_dump(RUN))
    token = secrets.token_hex(32)
    token_file = folder / "token"
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAYRLHF_JOB_RUNS": str(folder / "kept"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    script = Path(__file__).with_name("three_nodes.py")
    process = subprocess.Popen(
        [sys.executable, script, str(port)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / "cluster.log").open("w"),
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("{"), (folder / "cluster.log").read_text()[-3000:]
        yield Bench(folder, port, environment, json.loads(line), token)
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def steps(bench):
    return [row["step"] for row in read_metrics(bench.run)] if bench.run.is_dir() else []


def test_a_run_is_submitted_stopped_and_resumed_over_two_nodes_and_no_one_without_the_token_can(bench):
    submit = ("rayrlhf", "submit", "run.yaml", "--address", bench.url)

    code, output = bench.call(*submit, RAY_AUTH_MODE="disabled")
    assert (code, output.count("\n")) == (2, 1), output
    assert "401: the cluster needs a token" in output
    stranger = bench.folder / "stranger"
    stranger.write_text(secrets.token_hex(32))
    code, output = bench.call(*submit, RAY_AUTH_TOKEN_PATH=str(stranger))
    assert code == 2, output
    assert "403: the token is not the cluster's" in output

    following = bench.start(*submit, "--submission-id", "first")
    end = time.monotonic() + 300
    while len(steps(bench)) < 2 and following.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    assert len(steps(bench)) >= 2, following.communicate(timeout=10)[0] if following.poll() is not None else "no steps"
    code, output = bench.call("rayrlhf", "submit", "run.yaml", "--address", bench.url, "--stop", "--submission-id", "first")
    assert code == 0, output
    followed, _ = following.communicate(timeout=60)
    assert following.returncode == 75, followed
    assert "submitted first" in followed
    assert f"a relative run.root is below {bench.folder / 'kept'}" in followed
    assert "runs/job" not in followed.replace(str(bench.run), ""), "every path is absolute"
    assert re.search(r"step \d+", followed), followed
    assert len(list((bench.run / "checkpoints").glob("step-*"))) == 1
    stopped_after = steps(bench)[-1]
    assert stopped_after < STEPS

    actors = bench.actors()
    assert {node for name, node in actors if name == "PolicyActor"} == {bench.nodes["train"]}
    assert {node for name, node in actors if name == "RolloutActor"} == {bench.nodes["rollout"]}

    (bench.folder / "work" / "notes.txt").write_text("the working directory has changed, and with it Ray's copy")
    command = ("--", "rayrlhf", "ppo", "run.yaml")
    code, output = bench.call("ray", "job", "submit", "--address", bench.url, "--working-dir", ".", *command)
    assert code == 0, output
    assert "succeeded" in output
    assert f"run folder: {bench.run}" in output
    taken = [step for step in steps(bench) if step > 0]
    assert sorted(set(taken)) == list(range(1, STEPS + 1))
    for text in (followed, output):
        assert bench.token not in text
    assert bench.token not in "".join(path.read_text() for path in bench.run.rglob("*.yaml"))


LONG_END = """
import pathlib, signal, sys, time
from rayrlhf.actors.connection import connected

def end(*_):
    time.sleep(8)
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(75)

with connected(None):
    signal.signal(signal.SIGTERM, end)
    print("connected", flush=True)
    time.sleep(600)
"""


def test_a_job_of_rays_own_command_has_time_to_write_its_checkpoint(bench):
    (bench.folder / "work" / "long_end.py").write_text(LONG_END)
    written, where = bench.folder / "written", ("--address", bench.url)
    command = ("--no-wait", "--working-dir", ".", "--submission-id", "long", "--", "python", "long_end.py", str(written))
    code, output = bench.call("ray", "job", "submit", *where, *command)
    assert code == 0, output
    end = time.monotonic() + 100
    while "connected" not in (output := bench.call("ray", "job", "logs", *where, "long")[1]) and time.monotonic() < end:
        time.sleep(1)
    assert "kills it 3 s after" not in output
    code, output = bench.call("ray", "job", "stop", *where, "long")
    assert code == 0, output
    assert written.exists(), "Ray kills a stopped job after 3 s by default"
