"""Steps 8 to 10: whole PPO runs on one GPU and on several."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rayrlhf.config.launch import NodeSection
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.section import GIB
from rayrlhf.observe.cuda import vllm_cuda_build
from rayrlhf.observe.metric_names import LOGPROB_GAP
from rayrlhf.tools.gpu_check.random_work import tiny_model
from rayrlhf.tools.gpu_check.sampling_steps import GAP, require_gpu_build, tensor_parallel
from rayrlhf.tools.gpu_check.step_result import Figure
from rayrlhf.tools.launch.launch_plan import plan_run

RUN_GAP = 0.05
"""Bar of a run's mean log-prob gap in nats; its weights move between sampling and scoring of the first steps."""
STEPS = 3
NO_CRITIC = ("algorithm={kl: {coefficient: 0.0}, advantage: {estimator: reinforce}}",)
Metrics = list[dict[str, float]]
Train = Callable[[PPOConfig], Metrics]


def run_config(device: torch.device, root: str, overrides: Sequence[str]) -> PPOConfig:
    """Return a short run on built-in word problems."""
    size = "prompts_per_step: 4, max_new_tokens: 8" if device.type == "cpu" else "prompts_per_step: 64, max_new_tokens: 64"
    return load_config(
        PPOConfig,
        None,
        [
            f"run={{name: gpu-check, root: {root}, steps: {STEPS}}}",
            f"model={{path: '{tiny_model(device)}', dtype: bfloat16}}",
            "reward.functions=[{name: format, arguments: {pattern: '[0-9]'}}]",
            "data={chat: false, train: {path: 'builtin:word-problems?operations=1&largest=10', prompt_field: question}}",
            f"rollout={{{size}, max_model_length: 128, memory_gib: 0.0625, gpu_memory_utilization: 0.3}}",
            "evaluation.enabled=false",
            "checkpoint.every=0",
            "observe.live=false",
            *overrides,
        ],
    )


def train(config: PPOConfig) -> Metrics:
    """Run PPO and return the metrics of each step."""
    from rayrlhf.ppo.callbacks import Callback
    from rayrlhf.ppo.train_ppo import train_ppo

    found: Metrics = []

    class Keep(Callback):
        def on_step_end(self, step: int, metrics: Mapping[str, float], scored: Any) -> None:
            found.append(dict(metrics))

    train_ppo(config, [Keep()])
    return found


def in_flight(device: torch.device, run: Train = train) -> Iterator[Figure]:
    """Run PPO whose weights change while responses are unfinished."""
    require_gpu_build(device)
    overrides = ["rollout.weight_transfer=shared_memory", "async.max_staleness=1"]
    yield from _run(device, run, "shared_memory, in flight", overrides, bar=GAP)


def colocated(device: torch.device, run: Train = train) -> Iterator[Figure]:
    """Run PPO with all roles on one GPU.

    vLLM takes weights by `ipc` and sleeps; transformers samples where it is not installed.
    """
    if samples_with_vllm(device):
        yield from _run(device, run, "ipc", ["rollout.weight_transfer=ipc", "rollout.sleep=true"])
    else:
        yield from _run(device, run, "shared_memory, transformers", ["rollout.backend=transformers"])


def samples_with_vllm(device: torch.device) -> bool:
    """True if vLLM is installed and computes on the device."""
    return find_spec("vllm") is not None and (device.type == "cpu" or vllm_cuda_build() is not None)


def several_gpus(device: torch.device, run: Train = train) -> Iterator[Figure]:
    """Run ZeRO-3 over two ranks.

    With vLLM also `nccl` to a replica on its own GPU, and a replica over two.
    """
    backend = [] if samples_with_vllm(device) else ["rollout.backend=transformers"]
    yield from _run(device, run, "ZeRO-3 on 2 GPUs", [*backend, *NO_CRITIC, "placement.policy.ranks=2", "train.zero_stage=3"])
    if not backend:
        overrides = [*NO_CRITIC, "placement.mode=disaggregated", "rollout.weight_transfer=nccl"]
        yield from _run(device, run, "nccl", overrides)
        yield from tensor_parallel(device)


def _run(device: torch.device, run: Train, label: str, overrides: Sequence[str], bar: float = RUN_GAP) -> Iterator[Figure]:
    """Run PPO and yield its figures."""
    with TemporaryDirectory() as root:
        config = run_config(device, root, overrides)
        metrics = run(config)
    planned = planned_bytes(config, device) if device.type == "cuda" else {}
    yield from run_figures(metrics, planned, label, bar)


def planned_bytes(config: PPOConfig, device: torch.device) -> dict[str, int]:
    """Return the bytes that `rayrlhf plan` counts for one process of each role."""
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    gpus = torch.cuda.device_count()
    plan = plan_run(config, NodeSection(gpus=gpus, gpu_memory_gib=total, cpus=os.cpu_count() or 1))
    return {role: memory.total for role, memory in plan.memory.items() if role != "rollout"}


def run_figures(metrics: Metrics, planned: Mapping[str, int], label: str, bar: float) -> Iterator[Figure]:
    """Yield the figures of a run from the metrics of its steps.

    Args:
        planned: bytes by role; a role without memory on a device is left out.
        bar: of the mean log-prob gap in nats.
    """
    yield Figure(f"steps, {label}", float(len(metrics)), at_least=STEPS)
    gaps = [step[LOGPROB_GAP] for step in metrics]
    yield Figure(f"log-prob gap of a run, {label}", max(gaps), "nats", at_most=bar, headline=True)
    yield Figure(f"weight sync, {label}", metrics[-1]["sync/seconds"], "s", headline=True)
    for role, size in planned.items():
        held = metrics[-1].get(f"memory/{role}_device_gib")
        if held is not None:
            yield Figure(f"memory of {role} of the plan, {label}", held * GIB / size, at_most=1.1)
