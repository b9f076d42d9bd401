"""Peak memory of each role's processes, as returned by their last ping.

Linux keeps the peak of every process, so nothing is sampled and no extra call is made. Resident memory includes shared pages,
also those of the object store: the peaks of the roles do not add up to the run's.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from rayrlhf.config.section import GIB
from rayrlhf.observe.memory import peak_resident_bytes


class Footprint(NamedTuple):
    """Peak memory of one process in bytes: resident, and reserved by torch on its GPU."""

    resident: int = 0
    device: int = 0


def own_footprint(status: Path = Path("/proc/self/status")) -> Footprint:
    """Return this process's footprint; the current resident size where the system keeps no peak."""
    torch = sys.modules.get("torch")  # This must not import torch.
    device = int(torch.cuda.max_memory_reserved()) if torch is not None and torch.cuda.is_initialized() else 0
    return Footprint(peak_resident_bytes(status) or int(psutil.Process().memory_info().rss), device)


def role_peaks(footprints: Mapping[str, Footprint]) -> dict[str, float]:
    """Return metrics of the largest process of each role, in GiB.

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
