"""Random work of the steps: models, experience, clocks of a device."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from rayrlhf.config.model import ModelSection, Precision
from rayrlhf.config.train import OptimizerSection, TrainSection
from rayrlhf.data.records import Float32, TokenSequence
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.scoring.frozen import FrozenEngine
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.process_group import join_alone
from rayrlhf.engines.train.spec import TrainEngineSpec

VOCABULARY = 259
"""Tokens of `builtin:tiny`."""


def tiny_model(device: torch.device) -> str:
    """Return a random model, of some 60 M parameters on a GPU."""
    small, large = "layers=2&hidden=64&context=128&init=0.1", "layers=8&hidden=768&context=1024&init=0.03"
    return f"builtin:tiny?{small if device.type == 'cpu' else large}"


def random_sequences(lengths: Sequence[int], *, prompt: int = 8, vocabulary: int = VOCABULARY) -> list[TokenSequence]:
    """Return sequences of random tokens with prompts of `prompt` tokens."""
    generator = np.random.default_rng(0)
    return [TokenSequence(generator.integers(3, vocabulary, length).astype(np.int32), prompt) for length in lengths]


def random_experience(sequences: list[TokenSequence], *, vocabulary: int = VOCABULARY) -> TrainingBatch:
    """Return sequences with random advantages, and the log-probs of a uniform policy."""
    lengths = np.array([sequence.response_length for sequence in sequences])
    shape = (len(sequences), int(lengths.max()))
    return TrainingBatch(
        sequences,
        {
            "old_logprobs": np.full(shape, -np.log(vocabulary), dtype=np.float32),
            "advantages": np.random.default_rng(0).standard_normal(shape).astype(np.float32),
            "action_mask": np.arange(shape[1]) < lengths[:, None],
        },
    )


def train_engine(path: str, device: torch.device, precision: Precision, **train: object) -> TrainEngine:
    """Build a policy of one rank.

    AdamW's epsilon is as large as the gradient, so that its step is a smooth function of it: with the usual one the sign of
    a rounding error would decide the step of a weight with almost no gradient.
    """
    join_alone("gloo" if device.type == "cpu" else "nccl")
    section = TrainSection.model_validate({"optimizer": OptimizerSection(epsilon=0.1), **train})
    return TrainEngine(TrainEngineSpec(ModelSection(path=path, dtype=precision), frozenset({"lm"}), section, learning_rate=0.1))


def logprobs_of(engine: TrainEngine | FrozenEngine, sequences: list[TokenSequence], temperature: float = 1.0) -> list[Float32]:
    """Return the log-probs of each response in nats."""
    scores = engine.score(sequences, frozenset({"logprobs"}), temperature=temperature)
    return [one.logprobs for one in scores if one.logprobs is not None]


def timed(device: torch.device, work: Callable[[], object], rounds: int = 3) -> float:
    """Return the seconds of one call, the mean over rounds after a warm-up."""
    work()
    _finish(device)
    started = time.perf_counter()
    for _ in range(rounds):
        work()
    _finish(device)
    return (time.perf_counter() - started) / rounds


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Return the bytes that a call allocates at its peak on a GPU."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before
