"""Process that isolates an untrusted program; run as a script with the standard library alone.

It creates namespaces (users, processes, network, mounts, IPC, host name) and a file system in memory. That holds the system's
libraries and Python, read-only, and a work folder of limited size; absent files need no permission bits. There is no /proc, no
network, and no environment variable. It then drops every privilege and starts the program under resource limits. There are
three processes: the warden waits outside, its child is process 1 inside, and when that one ends the kernel kills all others
inside. A job of uid 0 becomes an ordinary user before the program starts, because the kernel exempts uid 0 from the process
limit.

The specification is read as JSON from standard input (`rayrlhf.rewards.sandbox` writes it). The result is written as JSON to
the file descriptor named there: `{"refused": reason}`, `{"timed_out": true}` or `{"status": wait status}`.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNPRIVILEGED_ID = 65534
"""User and group of a program started by uid 0."""
ROOT_BYTES = 2**20
"""Size of the root file system, which holds mount points and links only."""
SPARE_PROCESSES = 1
"""Process 1 counts against the program's limit."""

_NEW_USER, _NEW_PROCESSES, _NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
_NEW_MOUNTS, _NEW_HOST_NAME, _NEW_IPC = 0x00020000, 0x04000000, 0x08000000
_OTHERS = _NEW_PROCESSES | _NEW_NETWORK | _NEW_MOUNTS | _NEW_HOST_NAME | _NEW_IPC
_READ_ONLY, _NO_SET_UID, _NO_DEVICES, _NO_EXECUTION = 1, 2, 4, 8
_BIND, _MOVE, _RECURSIVE, _PRIVATE = 4096, 8192, 16384, 1 << 18
_MOUNT_SETATTR, _AT_RECURSIVE = 442, 0x8000
_DEATH_SIGNAL, _DUMPABLE, _NO_NEW_PRIVILEGES = 1, 4, 38

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(what: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _unshare(flags: int) -> None:
    _checked("creating namespaces (unshare)", _libc.unshare(flags))


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _checked(f"mounting {target}", result)


def _control(option: int, value: int) -> None:
    _checked("prctl", _libc.prctl(option, ctypes.c_ulong(value), *(ctypes.c_ulong(0) for _ in range(3))))


def _write(folder: int | None, name: str, text: str) -> None:
    descriptor = os.open(name, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _enter_user_namespace(process: int, inside: int) -> None:
    """Enter a user namespace with only this user.

    Args:
        process: descriptor of this process's folder in /proc.
        inside: id of its user and group inside. With 0 the process owns the namespaces that it creates next; with any other id
            it loses every privilege when it starts the program.
    """
    user, group = os.getuid(), os.getgid()
    _unshare(_NEW_USER)
    _write(process, "setgroups", "deny")
    _write(process, "uid_map", f"{inside} {user} 1")
    _write(process, "gid_map", f"{inside} {group} 1")


def _forbid_shared_memory() -> None:
    """Forbid System V shared memory and message queues.

    They outlive their process, so process limits do not apply to them.
    """
    try:
        for name in ("shmmni", "msgmni"):
            _write(None, f"/proc/sys/kernel/{name}", "0")
    except OSError as error:
        what = f"forbidding shared memory (Linux 6.8, or uid 0): {error.strerror}"
        raise OSError(error.errno, what) from error


def _build_root(spec: dict[str, Any]) -> None:
    """Replace the root folder with a file system in memory.

    Raises:
        OSError: the kernel refuses.
    """
    _mount("none", "/", "", _PRIVATE | _RECURSIVE)
    root = spec["mount_point"]
    _mount("tmpfs", root, "tmpfs", _NO_SET_UID | _NO_DEVICES, f"size={ROOT_BYTES},mode=755")
    for path in spec["visible"]:
        inside = root + path
        Path(inside).parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_symlink():
            Path(inside).symlink_to(Path(path).readlink())
            continue
        if Path(path).is_dir():
            Path(inside).mkdir(exist_ok=True)
        else:
            Path(inside).touch()
        _mount(path, inside, "", _BIND | _RECURSIVE)
    work = root + spec["work"]
    Path(work).mkdir(parents=True)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY | _NO_SET_UID, 0, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(-100),
        root.encode(),
        ctypes.c_uint(_AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(32),
    )
    if result < 0:
        _checked("making mounts read-only (mount_setattr, Linux 5.12)", result)
    size = f"size={spec['disk_bytes']},nr_inodes=4096,mode=700,uid={spec['owner']},gid={spec['owner']}"
    _mount("tmpfs", work, "tmpfs", _NO_SET_UID | _NO_DEVICES, size)
    os.chdir(root)
    _mount(root, "/", "", _MOVE)
    os.chroot(".")


def _become_ordinary() -> None:
    """Switch to an unprivileged user."""
    os.setgroups([])
    os.setresgid(UNPRIVILEGED_ID, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
    os.setresuid(UNPRIVILEGED_ID, UNPRIVILEGED_ID, UNPRIVILEGED_ID)


def _limit(spec: dict[str, Any]) -> None:
    bounds = {
        resource.RLIMIT_CPU: spec["cpu_seconds"],
        resource.RLIMIT_AS: spec["memory_bytes"],
        resource.RLIMIT_FSIZE: spec["file_bytes"],
        resource.RLIMIT_NOFILE: spec["open_files"],
        resource.RLIMIT_NPROC: spec["processes"] + SPARE_PROCESSES,
        resource.RLIMIT_CORE: 0,
    }
    for what, limit in bounds.items():
        hard = resource.getrlimit(what)[1]
        bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (bound, bound))


def _start(spec: dict[str, Any]) -> int:
    """Write the program's files and start it; returns its process id.

    Raises:
        OSError: the start failed; the program is not to blame.
    """
    os.chdir(spec["work"])
    for name, text in {**spec["files"], "stdin": spec["stdin"]}.items():
        Path(name).write_text(text, encoding="utf-8", errors="replace")
    read, write = os.pipe()
    started = os.fork()
    if started == 0:
        try:
            os.setsid()
            os.dup2(os.open("stdin", os.O_RDONLY), 0)
            _limit(spec)
            os.execve(spec["command"][0], spec["command"], spec["environment"])  # noqa: S606
        except OSError as error:
            os.write(write, f"starting {spec['command'][0]}: {error.strerror}".encode())
        os._exit(127)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        failure = pipe.read().decode()
    if failure:
        raise OSError(failure)
    return started


def _guard(spec: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Start the program and wait for it; exits the process at the wall time limit."""

    def time_out(*_: object) -> None:
        report({"timed_out": True})
        if started:
            os.killpg(started, signal.SIGKILL)  # without a process namespace its end kills no other process
        os._exit(0)

    started = 0
    signal.signal(signal.SIGALRM, time_out)
    signal.setitimer(signal.ITIMER_REAL, spec["wall_seconds"])
    started = _start(spec)
    while True:
        process, status = os.wait()
        if process == started:
            break
    signal.setitimer(signal.ITIMER_REAL, 0)
    report({"status": status})
    if not spec["contained"]:
        try:
            os.killpg(started, signal.SIGKILL)
        except ProcessLookupError:
            return


def _inside(spec: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Isolate process 1 and start the program."""
    try:
        if spec["contained"]:
            # Opened before the new root folder hides them.
            process, sysctl = os.open("/proc/self", os.O_RDONLY), os.open("/proc/sys/user", os.O_RDONLY)
            _forbid_shared_memory()
            _build_root(spec)
        if spec["root"]:
            _become_ordinary()
            _control(_DUMPABLE, 1)  # else the files of this process in /proc belong to root
        if spec["contained"]:
            _enter_user_namespace(process, UNPRIVILEGED_ID)
            _write(sysctl, "max_user_namespaces", "0")
            os.close(process)
            os.close(sysctl)
        _control(_DEATH_SIGNAL, signal.SIGKILL)
        _control(_DUMPABLE, 0)
        _control(_NO_NEW_PRIVILEGES, 1)
        _guard(spec, report)
    except OSError as error:
        report({"refused": error.strerror or str(error)})


def main() -> None:
    """Read the specification, run its program, report."""
    _control(_DEATH_SIGNAL, signal.SIGKILL)
    spec = json.loads(sys.stdin.buffer.read())
    descriptor = spec["report"]
    os.set_inheritable(descriptor, False)

    def report(result: dict[str, Any]) -> None:
        os.write(descriptor, json.dumps(result).encode() + b"\n")

    spec["root"] = os.getuid() == 0
    spec["owner"] = UNPRIVILEGED_ID if spec["root"] else 0
    try:
        if spec["contained"]:
            if not spec["root"]:
                process = os.open("/proc/self", os.O_RDONLY)
                _enter_user_namespace(process, 0)
                os.close(process)
            _unshare(_OTHERS)
        elif spec["root"]:
            os.chown(spec["work"], UNPRIVILEGED_ID, UNPRIVILEGED_ID)
        child = os.fork()
    except OSError as error:
        report({"refused": error.strerror or str(error)})
        return
    if child == 0:
        try:
            _inside(spec, report)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main()
