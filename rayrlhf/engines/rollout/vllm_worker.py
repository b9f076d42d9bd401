"""Preparation of a worker process of a tensor-parallel replica.

vLLM imports this module in every worker of an engine with `WORKER_EXTENSION`; the import registers the weight transfers and
applies the patches for CPUs that an engine of one process applies itself.
"""

from pathlib import Path
from typing import Any

import torch
from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
from vllm.platforms import current_platform

from rayrlhf.engines.rollout.token_counts import bound_kernels
from rayrlhf.engines.rollout.vllm_lora import use_plain_products
from rayrlhf.engines.rollout.vllm_plugin import register_transfers


class WorkerExtension:
    """Base class that vLLM adds to its worker; it has no methods."""


def unname_shared_memory() -> None:
    """Remove the names of workers' shared memory once all have mapped it.

    vLLM removes them at a regular end only, and a killed replica would leave 8 MiB.
    """
    initialize = _CPUSHMDistributed._init_cpu_shm

    def initialize_and_unname(group: Any) -> Any:
        handle = initialize(group)
        Path("/dev/shm", f"{group.group_name}_{group.communicator.rank}").unlink(missing_ok=True)  # noqa: S108
        return handle

    _CPUSHMDistributed._init_cpu_shm = initialize_and_unname


register_transfers()
if current_platform.is_cpu():
    torch.compiler.set_stance("force_eager")  # as around `VLLMRolloutEngine.poll`
    bound_kernels()
    use_plain_products()
    unname_shared_memory()
