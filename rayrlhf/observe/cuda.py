"""Usability of NVIDIA GPUs: torch's build, the driver and the visible devices.

A CUDA build without a usable GPU fails late and at length in vLLM, and silently computes on the CPU elsewhere. The facts here
need no CUDA context, so a driver process may read them before it starts others.
"""

import ctypes
import os
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from rayrlhf.errors import UserError

OLDEST_DRIVERS = {12: 525, 13: 580}
"""Oldest driver branch for all minor versions of a CUDA major version, from NVIDIA's table of CUDA compatibility."""
INSTALL = "pip install --no-deps -r requirements/gpu.txt"
HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs, also from Ray."""


class CudaFacts(NamedTuple):
    """Versions and devices that decide if CUDA works.

    Attributes:
        torch: version of torch.
        build: CUDA version that torch was built for; None for a build without CUDA.
        usable: devices that torch can compute on.
        driver: version of the NVIDIA driver; None without one.
        devices: GPUs that the driver has.
        visible: `CUDA_VISIBLE_DEVICES`, None if unset.
    """

    torch: str
    build: str | None
    usable: int
    driver: str | None
    devices: int
    visible: str | None

    @property
    def hidden(self) -> bool:
        """True if the environment hides all GPUs."""
        return self.visible is not None and self.visible in HIDDEN


class Fault(NamedTuple):
    """Reason why GPUs cannot be used, with its fix."""

    found: str
    fix: str


def read_cuda() -> CudaFacts:
    """Return the facts of this machine and process."""
    import torch

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    build = torch.version.cuda or torch.version.hip
    return CudaFacts(torch.__version__, build, usable, *_driver(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def find_fault(facts: CudaFacts) -> Fault | None:
    """Return why torch cannot compute on a GPU, or None if it can."""
    if facts.usable:
        return None
    if facts.build is None:
        return Fault(f"torch {facts.torch} is a build without CUDA", f"{INSTALL}, which replaces it by the CUDA build")
    if facts.driver is None:
        return Fault("no NVIDIA driver", "install one, or start the container with its GPUs (`docker run --gpus all`)")
    oldest = OLDEST_DRIVERS.get(int(facts.build.partition(".")[0]), 0)
    if int(facts.driver.partition(".")[0]) < oldest:
        return Fault(
            f"NVIDIA driver {facts.driver} is too old for CUDA {facts.build} of torch {facts.torch}",
            f"update the driver to {oldest} or newer",
        )
    if facts.visible is not None and facts.devices:
        return Fault(f"CUDA_VISIBLE_DEVICES={facts.visible} hides the {facts.devices} GPUs", "unset it, or name one of them")
    if not facts.devices:
        return Fault(f"no visible GPU (driver {facts.driver})", "start on a machine or container with GPUs")
    return Fault(f"torch cannot start CUDA on {facts.devices} GPUs", "`python -c 'import torch; torch.cuda.init()'` says why")


def vllm_cuda_build() -> str | None:
    """Return the version of an installed vLLM that computes on GPUs only, else None."""
    try:
        found = version("vllm")
    except PackageNotFoundError:
        return None
    return None if "+cpu" in found else found


def check_vllm_device(key: str) -> None:
    """Check that vLLM's GPU build finds a usable GPU.

    Raises:
        UserError: it does not; names the setting `key`, the reason and the mend.
    """
    build = vllm_cuda_build()
    fault = find_fault(read_cuda()) if build is not None else None
    if fault is not None:
        raise UserError(f"{key}: vllm {build} computes on GPUs only, and {fault.found}; {fault.fix}")


def check_devices() -> None:
    """Check that torch can use the GPUs that Ray will count on this machine.

    Raises:
        UserError: it cannot.
    """
    facts = read_cuda()
    fault = None if facts.hidden or not facts.devices else find_fault(facts)
    if fault is not None:
        raise UserError(
            f"this machine has {facts.devices} GPUs, but {fault.found}; {fault.fix}, "
            "or hide the GPUs with CUDA_VISIBLE_DEVICES= to compute on CPUs"
        )


def _driver() -> tuple[str | None, int]:
    """Return version and number of GPUs from the driver's library.

    (None, 0) without a driver.
    """
    text, count = ctypes.create_string_buffer(96), ctypes.c_uint()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))):
            return None, 0
        return text.value.decode(), 0 if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) else count.value
    except (OSError, AttributeError):
        return None, 0
