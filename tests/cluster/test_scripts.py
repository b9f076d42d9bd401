"""The scripts of `cluster/` are run, with stand-ins for Slurm's and Ray's commands that write down how they were called."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parent.parent.parent / "cluster"
STANDS_IN = {
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [[ "$1" == show ]]; then echo node-1; echo node-2; fi',
    "hostname": "echo 10.0.0.1 10.0.0.2",
    # Plays the whole run: it ends with 75 once it was asked to stop, else at once with what the test wants.
    "ray": 'if [[ -n "${STATUS:-}" ]]; then exit "$STATUS"; fi; while [[ ! -e "$CALLS.stop" ]]; do sleep 0.05; done; exit 75',
    "pkill": 'touch "$CALLS.stop"',
}


class Slurm:
    """A node on which the batch script of an example runs."""

    def __init__(self, folder):
        self.folder, self.calls = folder, folder / "calls"
        tools = folder / "bin"
        tools.mkdir()
        for name, body in STANDS_IN.items():
            path = tools / name
            path.write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{body}\n')
            path.chmod(0o755)
        activate = folder / ".venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        activate.touch()
        (folder / ".ray").mkdir()
        (folder / ".ray" / "auth_token").write_text("a-secret")
        self.environment = {
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder),
            "USER": "me",
            "CALLS": str(self.calls),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node-[1-2]",
            "SLURM_JOB_ID": "42",
        }

    def start(self, **environment):
        return subprocess.Popen(
            ["bash", CLUSTER / "slurm" / "multi-node.sbatch"],
            cwd=self.folder,
            env=self.environment | environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def called(self, name):
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [line.partition(" ")[2] for line in lines if line.split()[0] == name]


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


def test_near_its_end_a_slurm_job_asks_only_the_driver_to_stop_waits_for_it_and_is_queued_again(slurm):
    job = slurm.start()
    end = time.monotonic() + 20
    while not slurm.called("ray") and time.monotonic() < end:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=20)
    assert job.returncode == 75, errors
    assert slurm.called("pkill") == ["-TERM -u me -f bin/rayrlhf ppo"]
    assert slurm.called("scontrol")[-1] == "requeue 42"
    (call,) = slurm.called("ray")
    assert call.startswith("symmetric-run --address 10.0.0.1:6379 --min-nodes 2 --num-cpus=96 --num-gpus=8 -- rayrlhf ppo ")
    assert "a-secret" not in slurm.calls.read_text()


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_slurm_job_that_ends_by_itself_keeps_its_exit_code_and_is_not_queued_again(slurm, status):
    job = slurm.start(STATUS=str(status))
    _, errors = job.communicate(timeout=20)
    assert job.returncode == status, errors
    assert not any("requeue" in call for call in slurm.called("scontrol"))


def test_a_slurm_job_without_a_token_starts_nothing(slurm):
    (slurm.folder / ".ray" / "auth_token").unlink()
    job = slurm.start(STATUS="0")
    _, errors = job.communicate(timeout=20)
    assert job.returncode == 2
    assert "no token in" in errors
    assert slurm.called("ray") == []


def test_before_its_pod_goes_the_head_stops_the_jobs_that_run_and_no_others(slurm):
    listed = "JobDetails(submission_id='done', status=...), JobDetails(submission_id='busy', status=...)"
    (slurm.folder / "bin" / "ray").write_text(
        '#!/bin/bash\necho "ray $*" >> "$CALLS"\n'
        f'case "$2 $3" in "list ") echo "{listed}";; "status busy") echo RUNNING;; *) echo SUCCEEDED;; esac\n'
    )
    done = subprocess.run([CLUSTER / "before-stop.sh", "head"], env=slurm.environment, timeout=20)
    assert done.returncode == 0
    assert [call for call in slurm.called("ray") if "stop" in call] == ["job stop busy"]


def test_a_worker_stays_until_the_head_is_gone(slurm):
    gone = subprocess.run(
        [CLUSTER / "before-stop.sh", "worker"], env=slurm.environment | {"FQ_RAY_IP": "head.invalid"}, timeout=20
    )
    assert gone.returncode == 0
    assert subprocess.run([CLUSTER / "before-stop.sh"], env=slurm.environment, stderr=subprocess.DEVNULL).returncode == 2
