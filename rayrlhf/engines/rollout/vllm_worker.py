"""Preparation of a worker process of a replica of several devices.

vLLM imports this module in every worker of an engine with `WORKER_EXTENSION`; the import registers the weight transfers and
applies the patches for CPUs that an engine of one process applies itself.
"""

from pathlib import Path
from typing import Any

import torch
from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
from vllm.distributed.parallel_state import get_pp_group
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


def allocate_stage_inputs() -> None:
    """Allocate the inputs of later pipeline stages.

    VLLM 0.32 does so in the warm-up, which it skips on CPUs for a model that is not compiled.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    initialize = CPUModelRunner.initialize_kv_cache

    def initialize_and_allocate(runner: Any, *arguments: Any, **named: Any) -> None:
        initialize(runner, *arguments, **named)
        if not get_pp_group().is_first_rank:
            dtype, device = runner.model_config.dtype, runner.device
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(runner.max_num_tokens, dtype, device)

    CPUModelRunner.initialize_kv_cache = initialize_and_allocate


register_transfers()
if current_platform.is_cpu():
    torch.compiler.set_stance("force_eager")  # as around `VLLMRolloutEngine.poll`
    bound_kernels()
    use_plain_products()
    allocate_stage_inputs()
    unname_shared_memory()
