"""Sandbox for untrusted programs.

`run_program` isolates a program: no network, no files except the system's libraries and Python (read-only) and a small folder
in memory, no environment, no other processes, and limits on CPU time, wall time, memory, processes and files.
`rayrlhf.rewards.warden` implements it. It needs Linux 5.12 or newer on x86_64 or aarch64, and permission to create namespaces,
which containers often forbid. `missing()` tries once and returns the reason in one line. `run_program` then refuses, unless
`unsafe` is `warn`: the program then runs with resource limits only. Memory is limited per process, and so is the number of
processes; their product is the limit of the whole program.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rayrlhf.errors import UserError

Unsafe = Literal["refuse", "warn"]
"""Behavior where programs cannot be contained."""

_SYSTEM_PARTS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
SYSTEM = (
    *(f"{root}/{part}" for root in ("/usr", "/usr/local", "") for part in _SYSTEM_PARTS),
    *("/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/alternatives"),
)
"""Paths of the machine that a program sees, if they exist."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
WORK = "/tmp/work"  # noqa: S108 - in the sandbox's own file system
GRACE_SECONDS = 20.0
"""Time for the warden itself in addition to the program's, on a busy machine."""
ATTEMPTS = 3
"""Maximum number of starts when the sandbox itself fails, for example at the node's process limit."""
PAUSE_SECONDS = 0.5
_MIB = 2**20


class UncontainedWarning(RuntimeWarning):
    """Programs run without a sandbox."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits of a program.

    Attributes:
        cpu_seconds: CPU time of each process.
        wall_seconds: wall time; longer than the CPU time, so that a busy machine fails no good program.
        memory_mib: address space of each process, in MiB.
        processes: number of processes and threads.
        output_kib: size of standard output, of standard error and of any one file, in KiB; writing more fails.
        disk_mib: size of the work folder, in MiB.
        open_files: open files of each process.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 20.0
    memory_mib: int = 512
    processes: int = 8
    output_kib: int = 1024
    disk_mib: int = 16
    open_files: int = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a program.

    Attributes:
        status: exit code, or minus the signal that killed it; None when it reached the wall time limit.
        stdout: standard output, invalid UTF-8 replaced.
        stderr: standard error, likewise.
    """

    status: int | None
    stdout: str
    stderr: str


class SandboxError(Exception):
    """The sandbox itself failed; the program is not to blame."""


class _StoppedError(SandboxError):
    """The warden ended after the program had started."""


def run_program(
    files: Mapping[str, str],
    *,
    stdin: str = "",
    limits: Limits | None = None,
    unsafe: Unsafe = "refuse",
) -> Outcome:
    """Run `main.py` of the files with this Python in isolated mode.

    Args:
        files: name -> text, written to the program's working folder; `main.py` is run.
        stdin: standard input.
        limits: resource limits.
        unsafe: if programs cannot be contained, `refuse` or `warn` once and run with resource limits alone.

    Raises:
        UserError: programs cannot be contained here, under `refuse`.
        SandboxError: three starts failed.
    """
    lacking = missing()
    if lacking:
        line = f"programs cannot be contained on this machine: {lacking}"
        if unsafe == "refuse":
            raise UserError(f"{line}; allow it to create namespaces, or accept resource limits alone with unsafe: warn")
        warnings.warn(f"{line}; they run with resource limits alone", UncontainedWarning, stacklevel=2)
    for attempt in range(ATTEMPTS):
        try:
            return _run(files, stdin, limits or Limits(), contained=not lacking)
        except _StoppedError:
            if attempt == ATTEMPTS - 1:
                return Outcome(-signal.SIGKILL, "", "")  # three times: it is the program that stops its warden
        except SandboxError:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(PAUSE_SECONDS)
    raise AssertionError("unreachable")


@functools.cache
def missing() -> str:
    """Return in one line why programs cannot be contained here; empty when they can.

    Tried once per process.
    """
    if sys.platform != "linux":
        return "it is not Linux"
    try:
        outcome = _run({"main.py": "print(6 * 7)"}, "", Limits(cpu_seconds=20, wall_seconds=60), contained=True)
    except SandboxError as error:
        return str(error)
    return "" if outcome.stdout == "42\n" else f"Python does not run inside: {outcome.stderr.strip()[-200:] or outcome.status}"


def _run(files: Mapping[str, str], stdin: str, limits: Limits, *, contained: bool) -> Outcome:
    with (
        tempfile.TemporaryDirectory(prefix="rayrlhf-sandbox-") as folder,
        tempfile.NamedTemporaryFile() as out,
        tempfile.NamedTemporaryFile() as error,
    ):
        read, write = os.pipe()
        with os.fdopen(read, "rb") as report:
            spec = _specification(files, stdin, limits, folder, write, contained=contained)
            try:
                failure = _run_warden(spec, out.name, error.name, limits.wall_seconds)
            finally:
                os.close(write)
            result = report.read() + failure
        texts = [_text(file, limits) for file in (out, error)]
    if not result:
        raise SandboxError(f"the warden ended without a report: {texts[1].strip()[-300:]}")
    *before, how = map(json.loads, result.splitlines())
    if "refused" in how and not before:
        raise SandboxError(how["refused"])
    if "started" in how or "refused" in how:
        raise _StoppedError("the warden ended while the program ran")
    status = None if how.get("timed_out") else os.waitstatus_to_exitcode(how["status"])
    return Outcome(status, *texts)


def _run_warden(spec: dict[str, Any], out: str, error: str, wall_seconds: float) -> bytes:
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("warden.py"))]
    # The program can neither read nor overwrite earlier output, so a printed verdict is final.
    ends = [os.open(path, os.O_WRONLY | os.O_APPEND) for path in (out, error)]
    try:
        subprocess.run(
            command,
            input=json.dumps(spec).encode(),
            stdout=ends[0],
            stderr=ends[1],
            pass_fds=(spec["report"],),
            env=spec["environment"],
            timeout=wall_seconds + GRACE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return b'{"refused": "the warden did not end in time"}'
    finally:
        for end in ends:
            os.close(end)
    return b""


def _specification(
    files: Mapping[str, str], stdin: str, limits: Limits, folder: str, report: int, *, contained: bool
) -> dict[str, Any]:
    work = WORK if contained else folder
    return {
        "contained": contained,
        "files": dict(files),
        "stdin": stdin,
        "command": [sys.executable, "-I", "-B", "main.py"],
        "environment": {"PATH": "/usr/bin:/bin", "HOME": work, "TMPDIR": work, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
        "work": work,
        "mount_point": folder,
        "visible": _visible() if contained else [],
        "report": report,
        "cpu_seconds": limits.cpu_seconds,
        "wall_seconds": limits.wall_seconds,
        "memory_bytes": limits.memory_mib * _MIB,
        "file_bytes": limits.output_kib * 1024,
        "disk_bytes": limits.disk_mib * _MIB,
        "processes": limits.processes,
        "open_files": limits.open_files,
    }


@functools.cache
def _visible() -> list[str]:
    """Return visible paths: the system's and this Python's; none within another.

    Of a Python only its own parts are visible, because it may lie in a project's folder.
    """
    python = Path(sys.executable)
    homes = {python.resolve().parent.parent, Path(sys.base_prefix), Path(sys.prefix)}
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    paths = [Path(path) for path in (*SYSTEM, *DEVICES)]
    for home in sorted(home for home in homes if home.is_absolute()):
        paths += [home / part for part in ("bin", "lib64", "pyvenv.cfg", f"lib/{version}")]
        if home == Path(sys.base_prefix):
            paths += sorted((home / "lib").glob("lib*.so*"))
    kept: list[Path] = []
    for path in paths:
        if path.exists() and not any(
            path == other or (path.is_relative_to(other) and not other.is_symlink()) for other in kept
        ):
            kept.append(path)
    return [str(path) for path in kept]


def _text(file: Any, limits: Limits) -> str:
    file.seek(0)
    return bytes(file.read(limits.output_kib * 1024 + 1)).decode("utf-8", errors="replace")
