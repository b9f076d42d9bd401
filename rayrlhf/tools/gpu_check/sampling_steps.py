"""Steps 7 and 8: log-probs of the rollout engines, new weights, and sleep."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.rollout import RolloutSection
from rayrlhf.data.records import Rollout, RolloutRequest, SampleKey
from rayrlhf.engines.rollout.base import RolloutEngine
from rayrlhf.engines.rollout.common import RolloutSpec
from rayrlhf.engines.rollout.factory import build_rollout_engine
from rayrlhf.engines.scoring.frozen import FrozenEngine
from rayrlhf.models.load import load_causal_model
from rayrlhf.models.model_path import resolve_path
from rayrlhf.observe.cuda import vllm_cuda_build
from rayrlhf.tools.gpu_check.neighbor_process import Neighbor, neighbor
from rayrlhf.tools.gpu_check.random_work import logprobs_of, random_sequences, tiny_model
from rayrlhf.tools.gpu_check.step_result import Figure, StepSkippedError
from rayrlhf.weight_sync.buckets import bucketed

GAP = 0.03
"""Bar of the mean gap of log-probs in nats: the size of bfloat16's rounding."""
TEMPERATURES = (0.7, 1.0)


def sampler(device: torch.device) -> Iterator[Figure]:
    """Compare log-probs of the transformers engine with those of a forward pass."""
    yield from _gaps(device, "transformers")


def vllm_sampler(device: torch.device) -> Iterator[Figure]:
    """Compare log-probs of vLLM with those of a forward pass, with and without CUDA graphs."""
    require_gpu_build(device)
    with eager():
        yield from _gaps(device, "vllm", label="vLLM, eager")
    yield from _gaps(device, "vllm", label="vLLM, CUDA graphs")


def require_gpu_build(device: torch.device) -> None:
    """Check that vLLM computes on the device.

    Raises:
        StepSkippedError: it is the build for CPUs, and the device a GPU.
    """
    if device.type == "cuda" and vllm_cuda_build() is None:
        raise StepSkippedError("vLLM is installed as its build for CPUs")


@contextmanager
def eager() -> Iterator[None]:
    """Start vLLM engines without CUDA graphs inside the block."""
    from rayrlhf.engines.rollout import vllm_start

    settings = vllm_start._gpu_settings
    with patch.object(vllm_start, "_gpu_settings", lambda spec: settings(spec) | {"enforce_eager": True}):
        yield


def start(device: torch.device, backend: str, **rollout: Any) -> RolloutEngine:
    """Start an engine in bfloat16 on the steps' model."""
    settings = {"backend": backend, "max_concurrent": 32, "memory_gib": 0.0625, "gpu_memory_utilization": 0.3} | rollout
    model = ModelSection(path=tiny_model(device), dtype="bfloat16")
    return build_rollout_engine(RolloutSpec(model, RolloutSection.model_validate(settings), seed=0))


def _gaps(device: torch.device, backend: str, *, label: str = "transformers", **rollout: Any) -> Iterator[Figure]:
    """Yield the gap of an engine's log-probs at each temperature, and its speed."""
    reference = FrozenEngine(ModelSection(path=tiny_model(device), dtype="bfloat16"), 8192)
    engine = start(device, backend, **rollout)
    try:
        for temperature in TEMPERATURES:
            rollouts, speed = generate(engine, device, temperature)
            gap = mean_gap(reference, rollouts, temperature)
            yield Figure(f"log-prob gap, {label}, temperature {temperature:g}", gap, "nats", at_most=GAP, headline=True)
        yield Figure(f"sampling, {label}", speed, "tokens/s")
    finally:
        engine.close()


def tensor_parallel(device: torch.device, size: int = 2) -> Iterator[Figure]:
    """Compare log-probs of a replica over several devices with those of a forward pass."""
    yield from _gaps(device, "vllm", label=f"vLLM, tensor parallel {size}", tensor_parallel_size=size)


def generate(engine: RolloutEngine, device: torch.device, temperature: float) -> tuple[list[Rollout], float]:
    """Sample from random prompts; returns rollouts and tokens/s."""
    count, prompt, new = (3, 6, 8) if device.type == "cpu" else (32, 64, 128)
    prompts = [sequence.token_ids for sequence in random_sequences([prompt] * count)]
    requests = [RolloutRequest(SampleKey(0, index, 0), np.array(ids), index) for index, ids in enumerate(prompts)]
    started = time.perf_counter()
    engine.submit(requests, temperature=temperature, max_new_tokens=new)
    rollouts: list[Rollout] = []
    while engine.unfinished:
        rollouts += engine.poll(count)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    return rollouts, tokens / (time.perf_counter() - started)


def mean_gap(reference: FrozenEngine, rollouts: list[Rollout], temperature: float) -> float:
    """Return the mean |log-prob of the sampler - log-prob of the reference| in nats."""
    wanted = logprobs_of(reference, [rollout.sequence() for rollout in rollouts], temperature)
    gaps = [np.abs(logprobs - rollout.logprobs) for logprobs, rollout in zip(wanted, rollouts, strict=True)]
    return float(np.concatenate(gaps).mean())


def sleep(device: torch.device) -> Iterator[Figure]:
    """Load weights, sleep while a neighbor uses the memory, wake up with others."""
    require_gpu_build(device)
    with neighbor(device) as other:
        yield from sleep_figures(device, other, "vllm")


def sleep_figures(device: torch.device, other: Neighbor, backend: str) -> Iterator[Figure]:
    """Yield gaps after two loads, memory that sleep frees, and speed."""
    torch.zeros(1, device=device)  # the CUDA context is none of the engine's
    before = other.free_mib()
    engine = start(device, backend, sleep=True)
    try:
        generate(engine, device, 1.0)
        _, first = generate(engine, device, 1.0)
        with TemporaryDirectory() as folder:
            yield from _loaded(engine, device, Path(folder), 1)
        awake = other.free_mib()
        engine.sleep()
        freed, used = other.free_mib() - awake, before - awake
        # A CPU build frees nothing.
        bar = 0.7 * used if device.type == "cuda" else None
        yield Figure("memory that sleep frees", freed, "MiB", at_least=bar, headline=True)
        other.hold(0.9 * freed)
        other.give_back()
        other.hold(0.5 * max(other.free_mib() - freed, 0.0))
        with TemporaryDirectory() as folder:
            yield from _loaded(engine, device, Path(folder), 2)
        _, last = generate(engine, device, 1.0)
        # CUDA graphs that were lost would cost more than half of the speed of a small model.
        yield Figure("speed after two loads of that before", last / first, at_least=0.6 if device.type == "cuda" else None)
    finally:
        engine.close()


def _loaded(engine: RolloutEngine, device: torch.device, folder: Path, version: int) -> Iterator[Figure]:
    """Load changed weights and yield the gap to a forward pass with them."""
    path = tiny_model(device)
    changed = write_changed(path, folder, seed=version)
    started = time.perf_counter()
    engine.begin_weights(version)
    for bucket in bucketed(((name, tensor.detach()) for name, tensor in changed.named_parameters()), 2**28):
        engine.receive_weights(bucket)
    engine.finish_weights()
    seconds = time.perf_counter() - started
    rollouts, _ = generate(engine, device, 1.0)
    gap = mean_gap(FrozenEngine(ModelSection(path=str(folder), dtype="bfloat16"), 8192), rollouts, 1.0)
    yield Figure(f"log-prob gap after load {version}", gap, "nats", at_most=GAP, headline=True)
    versions = {int(one) for rollout in rollouts for one in rollout.versions}
    yield Figure(f"weight versions after load {version}", str(sorted(versions)), among=(f"[{version}]",))
    yield Figure(f"load {version} within a process", seconds, "s")


@torch.no_grad()
def write_changed(path: str, folder: Path, *, seed: int) -> Any:
    """Write and return a model with noise on its weights: old ones would show."""
    model: Any = load_causal_model(ModelSection(path=path))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    model.save_pretrained(folder)
    for file in Path(resolve_path(ModelSection(path=path))).glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return model
