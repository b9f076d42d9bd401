"""Process that isolates an untrusted program; run as a script with only the standard library.

It creates namespaces (users, processes, network, mounts, IPC, host name) and a file system in memory. That holds the system's
libraries and Python, read-only, and a work folder of limited size; absent files need no permission bits. There is no /proc, no
network, no environment variable, and an empty session keyring. System calls that a program does not need but could misuse fail
(`_CALLS`). It then drops every privilege and starts the program under resource limits. There are
three processes: the warden waits outside, its child is process 1 inside, and when that one ends the kernel kills all others
inside. A job of uid 0 becomes an ordinary user before the program starts, because the kernel exempts uid 0 from the process
limit.

The specification is read as JSON from standard input (`rayrlhf.rewards.sandbox` writes it). The result is written as JSON to
the file descriptor named there: `{"refused": reason}`, or `{"started": true}` and then `{"timed_out": true}` or
`{"status": wait status}`.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

UNPRIVILEGED_ID = 65534
"""User and group of a program started by uid 0."""
ROOT_BYTES = 2**20
"""Size of the root file system, which holds mount points and links only."""
PENDING_SIGNALS = 64
"""Limit of queued signals and timers, which take kernel memory."""
SPARE_PROCESSES = 1
"""Process 1 counts against the program's limit."""

_NEW_USER, _NEW_PROCESSES, _NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
_NEW_MOUNTS, _NEW_HOST_NAME, _NEW_IPC = 0x00020000, 0x04000000, 0x08000000
_OTHERS = _NEW_PROCESSES | _NEW_NETWORK | _NEW_MOUNTS | _NEW_HOST_NAME | _NEW_IPC
_READ_ONLY, _NO_SET_UID, _NO_DEVICES, _NO_EXECUTION = 1, 2, 4, 8
_BIND, _MOVE, _RECURSIVE, _PRIVATE = 4096, 8192, 16384, 1 << 18
_MOUNT_SETATTR, _AT_RECURSIVE = 442, 0x8000
_DEATH_SIGNAL, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVILEGES = 1, 4, 22, 38
_CALLS = {
    # keyrings outlive the program
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219)},
    # System V objects and message queues take kernel memory without a limit of the process
    **{"shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189)},
    **{"msgrcv": (70, 188), "msgctl": (71, 187), "semget": (64, 190), "semop": (65, 193), "semctl": (66, 191)},
    **{"semtimedop": (220, 192), "mq_open": (240, 180)},
    # other processes
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272)},
    **{"pidfd_getfd": (438, 438), "process_madvise": (440, 440), "perf_event_open": (298, 241)},
    # parts of the kernel that no such program needs
    **{"bpf": (321, 280), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426)},
    **{"io_uring_register": (427, 427), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39)},
    **{"pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430)},
    **{"fsmount": (432, 432), "mount_setattr": (442, 442), "personality": (135, 92), "open_by_handle_at": (304, 265)},
    **{"name_to_handle_at": (303, 264), "fanotify_init": (300, 262), "syslog": (103, 116), "init_module": (175, 105)},
    **{"finit_module": (313, 273), "kexec_load": (246, 104), "acct": (163, 89), "quotactl": (179, 60), "modify_ldt": (154, -1)},
}
"""Forbidden system calls: name -> numbers on x86_64 and aarch64, -1 where there is none."""

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


def _control(option: int, *values: int) -> None:
    _checked("prctl", _libc.prctl(option, *(ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4])))


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


def _leave_keyring() -> None:
    """Replace the session keyring by an empty one; without effect where the kernel forbids keyrings."""
    _libc.syscall(ctypes.c_long(_machine()[2]["keyctl"]), ctypes.c_long(1), None)


def _machine() -> tuple[int, int, dict[str, int]]:
    """Return audit code, column of `_CALLS`, and forbidden call numbers of this machine."""
    kinds = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
    if os.uname().machine not in kinds:
        raise OSError(errno.ENOSYS, f"no system call filter for {os.uname().machine}: expected {' or '.join(kinds)}")
    audit, column = kinds[os.uname().machine]
    return audit, column, {name: numbers[column] for name, numbers in _CALLS.items() if numbers[column] >= 0}


def _filter_calls() -> None:
    """Make the calls of `_CALLS` fail with EPERM, here and in child processes.

    Calls of the machine's other instruction sets end the process: their numbers differ.
    """
    audit, column, numbers = _machine()
    instructions = [(0x20, 0, 0, 4), (0x15, 1, 0, audit), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
    if column == 0:
        instructions += [(0x35, 0, 1, 0x40000000), (0x06, 0, 0, 0x80000000)]
    for number in numbers.values():
        instructions += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | errno.EPERM)]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in [*instructions, (0x06, 0, 0, 0x7FFF0000)])
    memory = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(memory)))
    _control(_SECCOMP, 2, ctypes.addressof(program))


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
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: PENDING_SIGNALS,
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
            _filter_calls()
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
    report({"started": True})
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
        _leave_keyring()
        if spec["contained"]:
            # Opened before the new root folder hides them.
            process, sysctl = os.open("/proc/self", os.O_RDONLY), os.open("/proc/sys/user", os.O_RDONLY)
            _build_root(spec)
        if spec["root"]:
            _become_ordinary()
            _control(_DUMPABLE, 1)  # else the files of this process in /proc belong to root
        if spec["contained"]:
            _enter_user_namespace(process, UNPRIVILEGED_ID)
            _write(sysctl, "max_user_namespaces", "0")
            os.close(process)
            os.close(sysctl)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a signal without a handler cannot end process 1
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
