"""Step 4: scores, updates and saved states of the train engine."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayrlhf.config.model import ModelSection, Precision
from rayrlhf.config.policy_loss import PPOLossSection
from rayrlhf.engines.objectives.policy import PolicyObjective
from rayrlhf.engines.scoring.frozen import FrozenEngine
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.tools.bench.paired import in_new_process
from rayrlhf.tools.gpu_check.kernel_steps import relative_gap
from rayrlhf.tools.gpu_check.random_work import logprobs_of, random_experience, random_sequences, tiny_model, train_engine
from rayrlhf.tools.gpu_check.step_result import Figure

LENGTHS = (40, 24, 60, 33)


def training(device: torch.device) -> Iterator[Figure]:
    """Compare scores with the reference, updates with float32, a restored state with its origin.

    Updates in float32 are those of a CPU.
    """
    # FlashAttention adds up the gradient of queries in any order, unless torch demands one.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    path, sequences = tiny_model(device), random_sequences(LENGTHS)
    policy = train_engine(path, device, "bfloat16")
    reference = FrozenEngine(ModelSection(path=path, dtype="bfloat16"), 8192)
    pairs = zip(logprobs_of(policy, sequences), logprobs_of(reference, sequences), strict=True)
    gap = max(float(abs(mine - theirs).max()) for mine, theirs in pairs)
    yield Figure("largest log-prob gap of policy and reference, bfloat16", gap, "nats", at_most=0.0)
    wanted = two_updates(path, "cpu", "float32", 0) if device.type == "cpu" else _on_cpu(path)
    for stage, offload in ((0, False), (1, False), (2, False), (3, False), (2, True)):
        precisions: tuple[Precision, ...] = ("float32", "bfloat16") if stage in (0, 3) else ("float32",)
        for precision in precisions:
            found = two_updates(path, device.type, precision, stage, offload=offload)
            name = f"ZeRO-{stage}{', offloaded' if offload else ''}, {precision}"
            bar = 1e-3 if precision == "float32" else 0.15
            yield Figure(f"relative gap of two updates, {name}", relative_gap(found, wanted), at_most=bar)
    yield from _restored(policy)


def _on_cpu(path: str) -> Tensor:
    """Return the updates in float32 of a process without GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        return torch.from_numpy(in_new_process(_two_updates_as_array, path))
    finally:
        if visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible


def _two_updates_as_array(path: str) -> NDArray[np.float32]:
    """Return them as an array; a tensor needs its sender to be received."""
    found: NDArray[np.float32] = two_updates(path, "cpu", "float32", 0).numpy()
    return found


def two_updates(path: str, device: str, precision: Precision, stage: int, *, offload: bool = False) -> Tensor:
    """Return the change of all weights by two updates, float32 [P] on the CPU."""
    engine = train_engine(path, torch.device(device), precision, zero_stage=stage, offload_optimizer=offload)
    before = _weights(engine)
    for _ in range(2):
        update(engine)
    return _weights(engine) - before


def update(engine: TrainEngine, lengths: Sequence[int] = LENGTHS) -> None:
    """Take one optimizer step on random experience."""
    batch = random_experience(random_sequences(lengths))
    engine.update(batch, UpdatePlan([[list(range(len(batch)))]]), PolicyObjective(PPOLossSection()))


def _weights(engine: TrainEngine) -> Tensor:
    return torch.cat([tensor.flatten() for bucket in engine.weight_buckets() for _, tensor in bucket])


def _restored(engine: TrainEngine) -> Iterator[Figure]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    update(engine)
    state = engine.capture_state()
    update(engine)
    wanted = engine.checksums()
    engine.load_captured([state])
    update(engine)
    found = engine.checksums()
    torch.use_deterministic_algorithms(False)
    different = sum(found[name] != wanted[name] for name in wanted)
    yield Figure("parameters that differ after a restored state", float(different), at_most=0)
