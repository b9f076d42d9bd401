"""`rayrlhf debug` on a run that ended and on one that hangs: stacks, logs, memory and settings, without secrets."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time

import pytest

from rayrlhf.errors import UserError
from rayrlhf.observe import stacks
from rayrlhf.observe.journal import RecoveryJournal
from rayrlhf.observe.vitals import FILE_NAME, MAX_BYTES, Vitals, local_processes
from rayrlhf.tools.debug.debug_command import write_debug
from rayrlhf.tools.debug.debug_facts import collect
from rayrlhf.tools.report.run_files import read_lines
from tests.tools.report.runs import config, write_run

SECRET = "Zq8vT3xWm5Zq8vT3xWm5"
HANGING = """
import sys, threading, time
from rayrlhf.observe.stacks import write_on_signal
write_on_signal()
def waits_for_ever():
    print("ready", flush=True)
    sys.stdin.read()
threading.Thread(target=lambda: time.sleep(600), name="other", daemon=True).start()
waits_for_ever()
"""


@pytest.fixture(scope="module")
def hanging():
    """A process that called `write_on_signal` and waits."""
    process = subprocess.Popen([sys.executable, "-c", HANGING], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait()


def vitals_row(pid, at, **changes):
    actor = {
        "state": "suspect",
        "call": "generate called 12 s ago",
        "pid": pid,
        "node": "10.0.0.7",
        "age": 12.5,
        "peak_gib": 1.5,
    }
    return {
        "time": at,
        "step": 3,
        "requests": {"open": 7, "in_flight": {"0": 7}},
        "waits": {"generate": 12.5},
        "resident_gib": 2.0 + at % 7,
        "actors": {"first/rollout/0": actor},
        "machine": {"available_gib": 9.0, "object_store_gib": 0.5},
        **changes,
    }


@pytest.fixture
def run(tmp_path, hanging, monkeypatch):
    """A run folder with everything that a run leaves, secrets included, and Ray's log of one of its processes."""
    folder = write_run(tmp_path / "run", steps=3)
    secrets = config("first", 3, reward={"headers": {"x-api-key": SECRET}, "url": f"https://me:{SECRET}@judge/score"})
    (folder / "config.yaml").write_text(json.dumps(secrets))
    journal = RecoveryJournal(folder)
    journal.write("lost", "first/rollout/0", f"it was called with --token {SECRET}", 0.0)
    now = time.time()
    rows = [vitals_row(hanging.pid, now - 5 * back) for back in (2, 1, 0)]
    (folder / FILE_NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "user_output.log").write_text(f"12:00:00 first/reward/0: password={SECRET}\n")
    stacks.save_stacks(folder, "first/rollout/0", "Thread MainThread\n  hung_here")
    logs = tmp_path / "ray" / "session_1" / "logs"
    logs.mkdir(parents=True)
    (logs / f"worker-abc-01000000-{hanging.pid}.err").write_text(f"RuntimeError: out of luck, api_key='{SECRET}'\n")
    (logs / f"worker-abc-01000000-{hanging.pid + 1}.err").write_text("of another process\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("MY_TOKEN", "value-of-a-variable")
    (folder / "user_output.log").write_text("12:00:00 first/reward/0: value-of-a-variable\n")
    return folder


def members(archive):
    with tarfile.open(archive) as file:
        return {entry.name.partition("/")[2]: file.extractfile(entry).read().decode() for entry in file}


def test_a_run_that_ended_gives_a_page_and_an_archive_without_secrets(run, hanging):
    page, archive = write_debug(run)
    found = members(archive)
    assert (page, archive) == (run / "debug.html", run / "debug.tar.gz")
    assert found["debug.html"] == page.read_text()
    assert {"config.yaml", "environment.json", "recovery.jsonl", "vitals.jsonl", "user_output.log", "machine.json"} <= set(
        found
    )
    assert "out of luck" in found[f"logs/first-rollout-0-worker-abc-01000000-{hanging.pid}.err"]
    assert not any("of another process" in text for text in found.values())
    assert any("hung_here" in text for name, text in found.items() if name.startswith("stacks/"))
    for name, text in found.items():
        assert SECRET not in text, name
        assert "value-of-a-variable" not in text, name
    for shown in ("hung_here", "out of luck", "generate called 12 s ago", "Rollout requests", "10.0.0.7", "x-api-key"):
        assert shown in found["debug.html"], shown


def test_a_run_that_hangs_shows_the_stacks_of_its_processes(run, hanging):
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        facts = collect(run)
    by_name = {process.name: process for process in facts.processes}
    assert {"driver", "first/rollout/0"} <= set(by_name)
    assert facts.view.state.state == "running"
    mine = facts.stacks[f"now-driver-{os.getpid()}.txt"]
    theirs = facts.stacks[f"now-first-rollout-0-{hanging.pid}.txt"]
    assert "test_a_run_that_hangs_shows_the_stacks_of_its_processes" in mine
    assert "waits_for_ever" in theirs


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        write_debug(tmp_path)


def test_a_run_of_another_kind_without_vitals_is_shown_too(tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {name: mine}\nworkers: {count: 1}\n")
    page, _ = write_debug(folder, tmp_path / "out" / "x.tar.gz") if (tmp_path / "out").mkdir() is None else None
    assert "No actors in vitals.jsonl" in page.read_text()


def test_stacks_come_from_inside_where_they_cannot_be_read_from_outside(hanging, monkeypatch):
    monkeypatch.setattr(stacks, "_from_outside", lambda pid: "")
    for _ in range(2):
        found = stacks.process_stacks(hanging.pid)
        assert found.count("in waits_for_ever") == 1
    assert hanging.poll() is None


def test_a_process_that_did_not_ask_for_it_is_not_signaled(monkeypatch):
    monkeypatch.setattr(stacks, "_from_outside", lambda pid: "")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        time.sleep(0.2)
        assert stacks.process_stacks(process.pid) == ""
        assert process.poll() is None


def test_a_stopped_process_shows_its_stacks(hanging):
    if not stacks._from_outside(hanging.pid):
        pytest.skip("this system lets no process read another one's memory")
    os.kill(hanging.pid, signal.SIGSTOP)
    try:
        assert any("waits_for_ever" in stacks.process_stacks(hanging.pid) for _ in range(5))  # a loaded machine takes longer
    finally:
        os.kill(hanging.pid, signal.SIGCONT)


def test_stacks_of_a_run_are_bounded_in_number(tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "MAX_FILES", 2)
    kept = [stacks.save_stacks(tmp_path, f"run/rollout/{rank}", "text") for rank in range(3)]
    assert [path is not None for path in kept] == [True, True, False]


def test_vitals_are_written_while_the_run_goes_on_and_keep_their_newest_lines(tmp_path):
    numbers = iter(range(10**6))
    with Vitals(tmp_path, lambda: {"number": next(numbers)}, every=0.02):
        time.sleep(0.2)
    rows = read_lines(tmp_path / FILE_NAME)
    assert [row["number"] for row in rows] == list(range(len(rows)))
    assert len(rows) > 2
    assert rows[0]["machine"]["available_gib"] > 0
    writer = Vitals(tmp_path, lambda: {"filler": "x" * MAX_BYTES})
    writer.write()
    assert (tmp_path / FILE_NAME).stat().st_size <= 2 * MAX_BYTES
    broken = Vitals(tmp_path, lambda: {}[0] if False else (_ for _ in ()).throw(RuntimeError("changed size")))
    broken.write()


def test_ray_workers_of_a_run_without_heartbeats_are_named_with_their_state():
    command = ["bash", "-c", "exec -a 'ray::RayTrainWorker  ' sleep 60"]
    with subprocess.Popen(command) as worker:
        time.sleep(0.3)
        os.kill(worker.pid, signal.SIGSTOP)
        time.sleep(0.1)
        found = local_processes()
        worker.kill()
    own = found["actors"][f"RayTrainWorker/{worker.pid}"]
    assert (own["pid"], own["state"], own["peak_gib"] > 0) == (worker.pid, "stopped", True)
    assert found["resident_gib"] > 0.01
