"""Start of vLLM's engine, or of its workers on a further node."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from rayrlhf.config.section import GIB
from rayrlhf.engines.rollout.common import VLLM_ENVIRONMENT, RolloutSpec, context_length, engine_reason
from rayrlhf.engines.rollout.token_counts import bound_kernels
from rayrlhf.engines.rollout.vllm_calls import try_out
from rayrlhf.engines.rollout.vllm_lora import INSTEAD, lora_settings
from rayrlhf.engines.rollout.vllm_plugin import register_transfers, transfer_name
from rayrlhf.engines.rollout.vllm_routing import routing_settings
from rayrlhf.errors import DeviceMemoryError, UserError
from rayrlhf.library_types import PretrainedConfig
from rayrlhf.models.load import resolve_dtype
from rayrlhf.models.model_path import resolve_path
from rayrlhf.observe.cuda import check_vllm_device

CPU_PREFILL_TOKENS = 4096
"""Prompt tokens per prefill on a CPU; more if the context is longer, because prompts are not chunked there."""
GPU_PREFILL_TOKENS = 8192
"""Prompt tokens per prefill on a GPU, where prompts are chunked. vLLM reserves memory for the activations of so many tokens:
the context of a long-context model would take gigabytes of the KV cache."""
KV_BLOCK_TOKENS = 32
"""Block size of a CPU's prefix cache: the smallest that vLLM's kernels are fast with, because prompts are short."""

STATEFUL = ("mamba2", "falcon_h1", "granitemoehybrid")
"""Families with states that CPUs serve without a prefix cache, which would need chunked prompts; vLLM refuses others."""

WORKER_EXTENSION = "rayrlhf.engines.rollout.vllm_worker.WorkerExtension"

UNREADABLE = "llvmlite.binding.ffi"
"""A module with an object without an ordinary `__dict__`. When vLLM 0.32 starts on a CPU it inspects the objects of all loaded
modules, and fails on this one; numba loads it, which bm25s imports."""


def start_engine(spec: RolloutSpec) -> Any:
    """Load the model and allocate the KV cache; returns an `LLMEngine`.

    Raises:
        UserError: vLLM refuses the settings, or is the build for GPUs and finds none.
    """
    prepare_process()
    from vllm.v1.engine.llm_engine import LLMEngine

    with explained(spec.section, spec.model.path, adapters=spec.adapters):
        with out_of_sight():
            engine = LLMEngine.from_engine_args(_engine_arguments(spec))
        try_out(engine)
    if spec.rollout.devices > 1:
        engine.engine_core.engine_core.model_executor.register_failure_callback(_end_process)
    return engine


def serve_node(spec: RolloutSpec) -> None:
    """Run the workers of a replica's further node; returns when one has ended.

    As `vllm serve --headless` does.

    Raises:
        UserError: as of `start_engine`.
    """
    prepare_process()
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    with explained(spec.section, spec.model.path, adapters=spec.adapters), out_of_sight():
        config = _engine_arguments(spec).create_engine_config(UsageContext.ENGINE_CONTEXT, headless=True)
        executor = MultiprocExecutor(config, monitor_workers=False)
    executor.start_worker_monitor(inline=True)


def prepare_process(key: str = "rollout.backend") -> None:
    """Check the device and set vLLM's environment variables, some of which it reads on import."""
    check_vllm_device(key)
    for name, value in VLLM_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def explained(section: str, path: str, *, adapters: bool = False) -> Iterator[None]:
    """Turn a refusal of vLLM into one line with the configuration's section and the model."""
    try:
        yield
    except (ValueError, AttributeError, AssertionError, ImportError, KeyError, NotImplementedError, TypeError) as error:
        kind = DeviceMemoryError if "ree memory on device" in str(error) else UserError
        reason = engine_reason(error)
        instead = f"; {INSTEAD}" if adapters and "LoRA" in reason else ""
        raise kind(f"{section}: vLLM cannot serve {path}: {reason}{instead}") from error


def _engine_arguments(spec: RolloutSpec) -> Any:
    from transformers import AutoConfig
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    path = resolve_path(spec.model)
    trust = spec.model.trust_remote_code
    config = AutoConfig.from_pretrained(path, revision=spec.model.revision, trust_remote_code=trust)
    if config.get_text_config() is not config and find_spec("torchvision") is None:
        raise UserError(f"{spec.section}: vLLM needs torchvision for {config.model_type}, a multimodal model: install it")
    length = context_length(spec.rollout, config)
    register_transfers()
    return EngineArgs(
        model=path,
        revision=spec.model.revision,
        trust_remote_code=trust,
        dtype=str(resolve_dtype(spec.model.dtype)).removeprefix("torch."),
        seed=spec.seed,
        max_model_len=length,
        max_num_seqs=spec.rollout.max_concurrent,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        disable_log_stats=True,
        use_tqdm_on_load=False,
        weight_transfer_config=WeightTransferConfig(backend=transfer_name(spec.rollout.weight_transfer)),
        **(_gpu_settings(spec) if torch.cuda.is_available() else _cpu_settings(spec, config, length)),
        **_worker_settings(spec),
        **({"hf_overrides": {"head_dtype": "float32"}} if spec.model.head_dtype == "float32" else {}),
        **(lora_settings(spec.model) if spec.adapters else {}),
        **(routing_settings() if spec.rollout.captures_routing else {}),
    )


def _worker_settings(spec: RolloutSpec) -> dict[str, Any]:
    """Return the settings of a worker process per device.

    vLLM would choose its Ray executor inside a placement group. That executor would request the GPUs from Ray that this
    process already has.
    """
    rollout, node = spec.rollout, spec.node
    if rollout.devices == 1:
        return {}
    return {
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "pipeline_parallel_size": rollout.pipeline_parallel_size,
        "distributed_executor_backend": "mp",
        "worker_extension_cls": WORKER_EXTENSION,
        "nnodes": node.count,
        "node_rank": node.rank,
        "master_addr": node.address,
        "master_port": node.port,
    }


def _end_process() -> None:
    """End this process, whose workers are gone."""
    sys.stderr.write("rollout: a worker process of vLLM died, and the replica ends with it\n")
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def out_of_sight() -> Iterator[None]:
    """Remove the module that vLLM cannot inspect from `sys.modules` inside the block."""
    module = sys.modules.pop(UNREADABLE, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[UNREADABLE] = module


def _cpu_settings(spec: RolloutSpec, config: PretrainedConfig, length: int) -> dict[str, Any]:
    register_model_class(config)
    bound_kernels()
    return {
        "enforce_eager": True,
        "enable_prefix_caching": config.model_type not in STATEFUL,
        # Seeded requests crash vLLM 0.32 on a CPU when it chunks a prompt ("CPU Generator does not use offset").
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_PREFILL_TOKENS, length, spec.rollout.max_concurrent),
        "kv_cache_memory_bytes": min(
            int(spec.rollout.memory_gib * GIB) // spec.rollout.devices, _useful_cache_bytes(spec, config, length)
        ),
        "block_size": KV_BLOCK_TOKENS,
    }


def _useful_cache_bytes(spec: RolloutSpec, config: PretrainedConfig, length: int) -> int:
    """Return the KV cache size of `max_concurrent` responses of full length, for each worker.

    vLLM zeroes its whole cache, which costs memory and a second per GiB.
    """
    text = config.get_text_config()
    queries = getattr(text, "num_attention_heads", None) or 1  # a model without attention has none
    head_size = getattr(text, "head_dim", None) or text.hidden_size // queries
    heads = getattr(text, "num_key_value_heads", None) or queries
    heads = max(1, heads // spec.rollout.tensor_parallel_size)
    layers = -(-text.num_hidden_layers // spec.rollout.pipeline_parallel_size)
    token_bytes = 2 * layers * heads * head_size * resolve_dtype(spec.model.dtype).itemsize
    blocks = (spec.rollout.max_concurrent + 1) * (length // KV_BLOCK_TOKENS + 1)
    return int(blocks * KV_BLOCK_TOKENS * token_bytes)


def _gpu_settings(spec: RolloutSpec) -> dict[str, Any]:
    return {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": max(GPU_PREFILL_TOKENS, spec.rollout.max_concurrent),
        "enable_sleep_mode": spec.rollout.sleep,
        "enforce_eager": spec.eager,
        "gpu_memory_utilization": spec.rollout.gpu_memory_utilization,
    }


def register_model_class(config: PretrainedConfig) -> None:
    """Import the model's class here.

    Otherwise vLLM starts a second interpreter to inspect it, to avoid initializing CUDA.
    """
    from vllm import ModelRegistry

    for architecture in getattr(config, "architectures", None) or ():
        if (known := ModelRegistry.models.get(architecture)) is not None:
            ModelRegistry.register_model(architecture, known.load_model_cls())
