"""Step 1: driver, build, devices and shared memory."""

import ctypes
import shutil
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

import torch

from rayrlhf.config.section import GIB
from rayrlhf.observe.cuda import OLDEST_DRIVERS, read_cuda
from rayrlhf.tools.doctor.machine_facts import SHARED
from rayrlhf.tools.gpu_check.step_result import Figure

COMPUTE_MODES = {0: "Default", 1: "Exclusive_Thread", 2: "Prohibited", 3: "Exclusive_Process"}
"""NVML's `nvmlComputeMode_t`. Roles that share a GPU are several processes, which only `Default` admits."""
VLLM_EXTENSIONS = ("vllm._C", "vllm.cumem_allocator")


def machine(device: torch.device) -> Iterator[Figure]:
    """Measure the machine itself; `device` is not computed on."""
    facts = read_cuda()
    yield Figure("driver", facts.driver or "none", headline=True)
    yield Figure("torch", facts.torch, headline=True)
    yield Figure("GPU", torch.cuda.get_device_name(0), headline=True)
    oldest = OLDEST_DRIVERS.get(int((facts.build or "0").partition(".")[0]), 0)
    yield Figure("driver branch", float((facts.driver or "0").partition(".")[0]), at_least=oldest)
    major, minor = torch.cuda.get_device_capability(0)
    yield Figure("compute capability", major + minor / 10, at_least=8.0)
    for index, mode in enumerate(compute_modes(facts.devices)):
        yield Figure(f"compute mode of GPU {index}", mode, among=("Default",))
    if facts.visible is None:
        yield Figure("GPUs of the driver that torch cannot use", float(facts.devices - facts.usable), at_most=0)
    yield Figure(f"free {SHARED}", shutil.disk_usage(SHARED).free / GIB, "GiB", at_least=1.0)
    for name in VLLM_EXTENSIONS if find_spec("vllm") is not None else ():
        try:
            import_module(name)
            found = "imports"
        except ImportError as error:
            found = str(error)
        yield Figure(name, found, among=("imports",))


def compute_modes(devices: int) -> list[str]:
    """Return the compute mode of each GPU, from the driver's library."""
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    nvml.nvmlInit_v2()
    modes = []
    for index in range(devices):
        handle, mode = ctypes.c_void_p(), ctypes.c_int(-1)
        nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
        nvml.nvmlDeviceGetComputeMode(handle, ctypes.byref(mode))
        modes.append(COMPUTE_MODES.get(mode.value, f"unknown ({mode.value})"))
    return modes
