"""A process of Ray that is stopped but alive is named after a while, and killed after a bound."""

import signal
import subprocess
import time

import psutil
import pytest

from rayrlhf.actors.stopped_processes import LOST_SECONDS, NAME_SECONDS, StoppedProcesses


@pytest.fixture
def processes():
    """One with a title as Ray's workers have, and one of somebody else, both stopped."""
    found = [
        subprocess.Popen(["bash", "-c", f"exec -a '{title}' sleep 60"], start_new_session=True)
        for title in ("ray::RayTrainWorker.poll_status", "sleep")
    ]
    for process, title in zip(found, ("ray::RayTrainWorker.poll_status", "sleep"), strict=True):
        while psutil.Process(process.pid).cmdline()[:1] != [title]:
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
    yield found
    for process in found:
        process.kill()
        process.wait()


def test_a_stopped_process_of_ray_is_named_once_and_then_killed(processes):
    lines = []
    watch = StoppedProcesses(lines.append)
    for now in (0.0, NAME_SECONDS - 1, NAME_SECONDS, NAME_SECONDS + 5, LOST_SECONDS - 1):
        watch.check(now)
    name = rf"RayTrainWorker (process {processes[0].pid})"
    assert lines == [f"{name}: stopped for 30 s; it counts as lost after 120 s"]
    watch.check(LOST_SECONDS)
    assert lines[1:] == [f"{name}: stopped for 120 s; the process is killed"]
    assert processes[0].wait(10) == -signal.SIGKILL
    assert processes[1].poll() is None


def test_one_that_went_on_meanwhile_is_not_counted(processes):
    lines = []
    watch = StoppedProcesses(lines.append)
    watch.check(0.0)
    processes[0].send_signal(signal.SIGCONT)
    while psutil.Process(processes[0].pid).status() == psutil.STATUS_STOPPED:
        time.sleep(0.01)
    watch.check(LOST_SECONDS)
    processes[0].send_signal(signal.SIGSTOP)
    while psutil.Process(processes[0].pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    watch.check(LOST_SECONDS + 1)
    assert lines == []
