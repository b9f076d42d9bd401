"""Programs that do what must not be done. A bounded loop proves the limit on processes before anything forks without end."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rayrlhf.errors import UserError
from rayrlhf.rewards import sandbox, warden
from rayrlhf.rewards.sandbox import Limits, Outcome, run_program

LACKING = sandbox.missing()
contained = pytest.mark.skipif(bool(LACKING), reason=f"programs cannot be contained here: {LACKING}")
SYSTEM_PYTHON = Path("/usr/bin/python3")


def run(program: str, **limits: float) -> Outcome:
    return run_program({"main.py": textwrap.dedent(program)}, limits=Limits(**limits))  # type: ignore[arg-type]


FORK_200 = """
    import os, time
    made = 0
    for _ in range(200):
        try:
            if os.fork() == 0:
                time.sleep(10)
                os._exit(0)
        except OSError:
            break
        made += 1
    print(made)
"""


@pytest.fixture(scope="module")
def processes_are_bounded() -> None:
    made = int(run(FORK_200, processes=32).stdout)
    if made > 32:
        pytest.fail(f"{made} processes against a limit of 32: no fork bomb will be tried")


def wardens() -> int:
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return lines.count(str(warden.__file__))


@contained
def test_a_program_reads_its_input_and_its_output_and_status_come_back():
    program = "import sys; print(input() * 2); print('oh', file=sys.stderr); sys.exit(3)"
    assert run_program({"main.py": program}, stdin="ab\n") == Outcome(3, "abab\n", "oh\n")


@contained
def test_a_fork_bomb_ends_with_its_time_and_leaves_nothing_behind(processes_are_bounded):
    bomb = """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """
    before = wardens()
    assert run(bomb, processes=8, wall_seconds=1.0).status is None
    assert wardens() == before


@contained
@pytest.mark.parametrize(
    "way",
    [
        "bytearray(10 * 2**30)",
        "mmap.mmap(-1, 10 * 2**30)",
        "os.ftruncate(os.memfd_create('a'), 10 * 2**30)",
        "ctypes.CDLL(None, use_errno=True).shmget(0, 4096, 0o1600) < 0 and os.abort()",
    ],
)
def test_ten_gigabytes_cannot_be_allocated_in_any_of_the_ways(way):
    outcome = run(f"import ctypes, mmap, os\n{way}\nprint('got it')")
    assert outcome.status != 0
    assert outcome.stdout == ""


@contained
def test_an_endless_loop_is_stopped_by_its_cpu_time_and_a_sleeper_by_the_clock():
    assert run("while True: pass", cpu_seconds=1, wall_seconds=120.0).status == -9
    assert run("import time; time.sleep(60)", wall_seconds=0.5).status is None


@contained
def test_nothing_can_be_written_outside_of_the_work_folder_and_that_is_small(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("unseen")
    places = ["/x", "/tmp/x", "/usr/x", "/etc/x", "/dev/x", sys.executable, str(tmp_path / "x"), str(secret)]
    program = f"""
        import os
        for path in {places}:
            try:
                open(path, "a").write("x")
                print("wrote", path)
            except OSError:
                pass
        print([os.path.exists(path) for path in {[str(secret), __file__, "/proc/1", "/etc/passwd"]}])
        try:
            for n in range(100):
                os.write(os.open(str(n), os.O_WRONLY | os.O_CREAT), b"x" * 2**18)
        except OSError as error:
            print(n <= 16, error.errno)
    """
    assert run(program, disk_mib=4).stdout.split("\n") == ["[False, False, False, False]", "True 28", ""]
    assert secret.read_text() == "unseen"


@contained
def test_there_is_no_network_and_the_job_s_environment_is_not_seen(monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret-word")
    program = """
        import os, socket
        for address in [("127.0.0.1", 22), ("192.0.2.1", 80)]:
            try:
                socket.create_connection(address, 2)
                print("connected")
            except OSError as error:
                print(error.errno)
        print("secret-word" in str(os.environ))
    """
    assert run(program).stdout.split() == ["101", "101", "False"]


@contained
def test_a_program_has_no_privilege_can_gain_none_and_reaches_no_other_process():
    program = f"""
        import ctypes, os
        libc = ctypes.CDLL(None)
        print([libc.unshare(flag) for flag in (0x10000000, 0x20000, 0x40000000)])
        print(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, b""), libc.umount2(b"/", 2), libc.chroot(b"/tmp"), libc.setuid(0))
        print(os.getuid() == 0, os.path.exists("/../..{Path(__file__).resolve()}"))
        os.kill(1, 9)
        try:
            os.kill(-1, 9)
        except ProcessLookupError:
            print("alone")
    """
    assert run(program).stdout.split("\n") == ["[-1, -1, -1]", "-1 -1 -1 -1", "False False", "alone", ""]


@contained
def test_what_a_program_leaves_running_ends_with_it_and_endless_output_is_cut():
    daemon = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(60)
            os._exit(0)
        print("left")
    """
    before = wardens()
    assert run(daemon).stdout == "left\n"
    assert wardens() == before
    endless = run("while True: print('x' * 1000)", output_kib=8)
    assert endless.status != 0
    assert len(endless.stdout) == 8 * 1024


@contained
def test_what_was_written_can_be_neither_read_nor_changed():
    program = """
        import os
        print("said", flush=True)
        try:
            print(os.pread(1, 100, 0))
        except OSError as error:
            print(error.errno, flush=True)
        os.pwrite(1, b"more", 0)
    """
    assert run(program).stdout == "said\n9\nmore"


def test_a_sandbox_that_fails_is_tried_three_times_in_all_and_then_it_is_an_error(monkeypatch):
    fails = [sandbox.SandboxError("no process left")] * 2
    real = sandbox._run

    def flaky(*given, **named):
        if fails:
            raise fails.pop()
        return real(*given, **named)

    monkeypatch.setattr(sandbox, "missing", lambda: "")
    monkeypatch.setattr(sandbox, "_run", flaky)
    monkeypatch.setattr(sandbox, "PAUSE_SECONDS", 0.0)
    if not LACKING:
        assert run("print(1)").stdout == "1\n"
    fails[:] = [sandbox.SandboxError("no process left")] * 3
    with pytest.raises(sandbox.SandboxError, match="no process left"):
        run("print(1)")
    assert fails == []


def test_what_cannot_be_contained_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sandbox, "missing", lambda: "creating namespaces (unshare): Operation not permitted")
    with pytest.raises(UserError, match=r"cannot be contained on this machine: creating namespaces \(unshare\): Operation not"):
        run_program({"main.py": "print(1)"})


@pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason="needs a Python that every user may run")
def test_under_warn_it_runs_with_limits_and_not_as_root(monkeypatch):
    monkeypatch.setattr(sandbox, "missing", lambda: "no namespaces")
    monkeypatch.setattr(sys, "executable", str(SYSTEM_PYTHON))
    with pytest.warns(RuntimeWarning, match="no namespaces; they run with resource limits alone"):
        greedy = run_program({"main.py": "import os; print(os.getuid(), flush=True); bytearray(2**33)"}, unsafe="warn")
    assert greedy.status == 1
    assert "MemoryError" in greedy.stderr
    assert int(greedy.stdout) != 0
    with pytest.warns(RuntimeWarning):
        assert run_program({"main.py": "while True: pass"}, limits=Limits(wall_seconds=0.5), unsafe="warn").status is None


@contained
@pytest.mark.skipif(os.getuid() != 0 or not SYSTEM_PYTHON.exists(), reason="needs uid 0 and a Python that every user may run")
def test_an_ordinary_user_s_programs_are_contained_too():
    script = f"""
        import os, sys
        from rayrlhf.rewards.sandbox import Limits, missing, run_program
        os.setgroups([])
        os.setresgid(1234, 1234, 1234)
        os.setresuid(1234, 1234, 1234)
        sys.executable, sys.prefix, sys.base_prefix = "{SYSTEM_PYTHON}", "/usr", "/usr"
        if missing():
            print(missing())
        else:
            outcome = run_program({{"main.py": {textwrap.dedent(FORK_200)!r}}}, limits=Limits(processes=32))
            print(int(outcome.stdout) <= 32)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, timeout=60
    )
    if "unshare" in done.stdout or "Linux" in done.stdout:
        pytest.skip(f"this kernel does not let users: {done.stdout}")
    assert done.stdout == "True\n", done.stderr
