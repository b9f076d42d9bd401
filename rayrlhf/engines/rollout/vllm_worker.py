"""Preparation of a worker process of a tensor-parallel replica.

vLLM imports this module in every worker of an engine with `WORKER_EXTENSION`; the import registers the weight transfers and
applies the patches for CPUs that an engine of one process applies itself.
"""

import torch
from vllm.platforms import current_platform

from rayrlhf.engines.rollout.token_counts import bound_kernels
from rayrlhf.engines.rollout.vllm_lora import use_plain_products
from rayrlhf.engines.rollout.vllm_plugin import register_transfers


class WorkerExtension:
    """Base class that vLLM adds to its worker; it has no methods."""


register_transfers()
if current_platform.is_cpu():
    torch.compiler.set_stance("force_eager")  # as around `VLLMRolloutEngine.poll`
    bound_kernels()
    use_plain_products()
