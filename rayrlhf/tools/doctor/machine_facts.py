"""Facts about a machine, gathered once, so that checks are pure."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import psutil
from packaging.requirements import Requirement

from rayrlhf.models.builtin import cache_folder
from rayrlhf.observe.cuda import CudaFacts, read_cuda
from rayrlhf.observe.host_limits import existing_parent
from rayrlhf.rewards.sandbox import missing

OWN = re.compile(r"gcs_server|raylet|ray::\w+|(?<=/ray/)[\w/]+(?=\.py)|rayrlhf [\w-]+")
"""Part of a command line that names a process of Ray or of this package."""
IMPORT_SECONDS = 180.0
"""Timeout of an import in its own process; the first one of vLLM reads gigabytes."""
SHARED = "/dev/shm"  # noqa: S108 - Ray's object store, only read here
VARIABLES = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "RAY_ADDRESS", "RAY_AUTH_MODE")
PORTS = {6379: "Ray's control store (`ray start --head`)", 8265: "Ray's dashboard and job server"}


class Listener(NamedTuple):
    """A listening TCP socket: address, port, process and service."""

    address: str
    port: int
    pid: int
    name: str

    @property
    def is_local(self) -> bool:
        """True if only this machine can connect."""
        return self.address.removeprefix("::ffff:").startswith(("127.", "::1"))


@dataclass(frozen=True, slots=True)
class Facts:
    """One machine.

    Attributes:
        system: `sys.platform`.
        packages: installed version of every required package, None if missing.
        requirements: requirements in the package metadata (`torch==2.13.0 ; extra == 'cpu'`).
        imports: module -> None if it can be imported, else the last line of the error.
        programs: program -> its path, or None.
        shared_memory: (total bytes, free bytes) of `SHARED`; None if it does not exist.
        processor_flags: of the first core.
        cuda: torch's build, driver and devices; None without torch.
        gpus: names of those that torch can use.
        nccl: True if torch was built with NCCL; None without GPUs.
        busy_ports: those of `PORTS` that are in use.
        listeners: sockets of Ray's and this package's processes that accept connections.
        disk_free: folder -> bytes.
        memory: bytes of main memory.
        writable: folder -> True if files can be created.
        sandbox: why the reward `code` cannot sandbox programs here; empty if it can.
    """

    python: tuple[int, int]
    system: str
    packages: Mapping[str, str | None]
    requirements: tuple[str, ...]
    imports: Mapping[str, str | None]
    programs: Mapping[str, str | None]
    shared_memory: tuple[int, int] | None
    processor_flags: frozenset[str]
    cuda: CudaFacts | None
    gpus: tuple[str, ...]
    nccl: bool | None
    busy_ports: tuple[int, ...]
    listeners: tuple[Listener, ...]
    disk_free: Mapping[str, int]
    memory: int
    writable: Mapping[str, bool]
    environment: Mapping[str, str]
    sandbox: str


def gather(runs: Path = Path("runs")) -> Facts:
    """Gather the facts of this machine; takes as long as importing vLLM."""
    wanted = tuple(requires("rayrlhf") or ())
    names = {Requirement(text).name for text in wanted}
    folders = {"model cache": cache_folder(), "run folders": runs}
    cuda, gpus, nccl = _gpus()
    return Facts(
        python=sys.version_info[:2],
        system=sys.platform,
        packages={name: _version(name) for name in names},
        requirements=wanted,
        imports=_import_errors(("torch", "torchvision", "transformers", "ray", "deepspeed", "vllm")),
        programs={name: shutil.which(name) for name in ("g++", "ninja")},
        shared_memory=_shared_memory(),
        processor_flags=_processor_flags(),
        cuda=cuda,
        gpus=gpus,
        nccl=nccl,
        busy_ports=tuple(port for port in PORTS if _listens(port)),
        listeners=_listeners(),
        disk_free={name: shutil.disk_usage(existing_parent(folder)).free for name, folder in folders.items()},
        memory=psutil.virtual_memory().total,
        writable={name: os.access(existing_parent(folder), os.W_OK) for name, folder in folders.items()},
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
        sandbox=missing(),
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _import_errors(names: Sequence[str]) -> dict[str, str | None]:
    """Return the error of each installed package's import, or None.

    They are imported together, which is faster; each by itself only if that fails.
    """
    installed = [name for name in names if importlib.util.find_spec(name) is not None]
    if _import_error(", ".join(installed)) is None:
        return dict.fromkeys(names)
    return {name: _import_error(name) if name in installed else None for name in names}


def _import_error(name: str) -> str | None:
    """Return the error of an import, or None; it runs in a new process."""
    command = [sys.executable, "-c", f"import {name}"]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return f"not finished after {IMPORT_SECONDS:.0f} s"
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    return None if run.returncode == 0 else (lines[-1] if lines else f"exit code {run.returncode}")


def _shared_memory() -> tuple[int, int] | None:
    if not Path(SHARED).is_dir():
        return None
    usage = shutil.disk_usage(SHARED)
    return usage.total, usage.free


def _processor_flags() -> frozenset[str]:
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return frozenset()
    line = next((line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("flags")), ":")
    return frozenset(line.partition(":")[2].split())


def _gpus() -> tuple[CudaFacts | None, tuple[str, ...], bool | None]:
    if importlib.util.find_spec("torch") is None:
        return None, (), None
    import torch

    cuda = read_cuda()
    names = tuple(torch.cuda.get_device_name(index) for index in range(cuda.usable))
    return cuda, names, torch.distributed.is_nccl_available() if names else None


def _listeners() -> tuple[Listener, ...]:
    """Return the listening TCP sockets of the visible processes of Ray and this package."""
    found = set()
    for process in psutil.process_iter():
        try:
            named = OWN.search(" ".join(process.cmdline()))
            for one in process.net_connections(kind="tcp") if named else ():
                if one.status == psutil.CONN_LISTEN and named:
                    found.add(Listener(one.laddr.ip, one.laddr.port, process.pid, named[0]))
        except psutil.Error:
            continue
    return tuple(sorted(found))


def _listens(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(0.5)
        return client.connect_ex(("127.0.0.1", port)) == 0
