"""Check of requested CPUs and GPUs against this machine, before Ray starts."""

import os
from collections.abc import Callable

from rayrlhf.actors.placement import ClusterResources
from rayrlhf.observe.cuda import check_devices
from rayrlhf.observe.host_limits import check_host_limits


def check_local_machine(address: str | None, fits: Callable[[ClusterResources], object]) -> None:
    """Call `fits` with the resources of this machine, unless the run joins a running cluster.

    Args:
        address: configured Ray address.
        fits: raises a `UserError` if the machine is too small.

    Raises:
        UserError: of `fits`, GPUs that torch cannot use, or a limit of the system that is too low.
    """
    import ray

    from rayrlhf.actors.connection import ambient_address

    if not ray.is_initialized() and (address or os.environ.get("RAY_ADDRESS") or ambient_address()) == "local":
        check_devices()
        check_host_limits()
        fits(this_machine())


def this_machine() -> ClusterResources:
    """Return the CPUs and GPUs of this machine.

    Ray finds fewer CPUs in a container with a quota.
    """
    import torch

    return ClusterResources((float(os.cpu_count() or 1),), (float(torch.cuda.device_count()),))
