"""How much memory each role's processes took at most, as they last told with the answer to a ping.

A process knows its own peak (Linux keeps it), so nothing is sampled and no call is made for it. Resident memory counts pages
that are shared, the object store's too: the peaks of roles say which one needs how much and do not add up to the run's.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

GIB = 2**30


class Footprint(NamedTuple):
    """Largest memory of one process so far, in bytes: resident, and reserved on its GPU by torch (0 without one)."""

    resident: int = 0
    device: int = 0


def own_footprint(status: Path = Path("/proc/self/status")) -> Footprint:
    """Read this process's footprint; where the system keeps no peak, the resident size of this moment stands in."""
    torch = sys.modules.get("torch")  # asking must not import it
    device = int(torch.cuda.max_memory_reserved()) if torch is not None and torch.cuda.is_initialized() else 0
    lines = status.read_text().splitlines() if status.is_file() else []
    peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    return Footprint(peak or int(psutil.Process().memory_info().rss), device)


def role_peaks(footprints: Mapping[str, Footprint]) -> dict[str, float]:
    """Metrics of the largest process of each role, in GiB.

    Args:
        footprints: by actor name, `RUN/ROLE/RANK`.

    Returns:
        `memory/ROLE_gib`, and `memory/ROLE_device_gib` where a GPU was used.
    """
    metrics: dict[str, float] = {}
    for name, footprint in footprints.items():
        role = name.split("/")[-2]
        for metric, size in ((f"memory/{role}_gib", footprint.resident), (f"memory/{role}_device_gib", footprint.device)):
            if size:
                metrics[metric] = max(metrics.get(metric, 0.0), size / GIB)
    return metrics
