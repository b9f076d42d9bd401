"""What the tests of the train engine share: a process group of one, models as folders, random experience."""

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from rayrlhf.data.records import TokenSequence
from rayrlhf.data.training_batch import TrainingBatch
from rayrlhf.engines.train import process_group
from rayrlhf.engines.train.process_group import leave

ARCHITECTURES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def join_alone() -> None:
    """Join a process group of one; all tests of a process share it. One thread: for tiny models a second one only waits."""
    torch.set_num_threads(1)
    process_group.join_alone()


def leave_at_once() -> None:
    """Leave the world and end this process, as its last act.

    DeepSpeed keeps groups in globals, and gloo aborts now and then when their threads are taken down with the interpreter.
    """
    leave()
    os._exit(0)


def write_model(folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Path:
    """Write a checkpoint as TRL saved them: config and weights, heads included."""
    folder.mkdir(parents=True)
    architecture = ARCHITECTURES[config["model_type"]]
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_llama(folder: Path, *, tie: bool = False, layers: int = 2, vocabulary: int = 61, seed: int = 0) -> Path:
    """Write a random Llama that learns visibly within a step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=tie,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def random_sequences(count: int, seed: int = 0, vocabulary: int = 61) -> list[TokenSequence]:
    generator = np.random.default_rng(seed)
    return [
        TokenSequence(generator.integers(0, vocabulary, size=prompt + response).astype(np.int32), int(prompt))
        for prompt, response in zip(generator.integers(1, 9, count), generator.integers(1, 14, count), strict=True)
    ]


def grouped_sequences(count: int, samples: int, *, prompt: int = 20) -> list[TokenSequence]:
    """Groups with a common prompt; the second half of a group branches off inside the first one's response."""
    generator = np.random.default_rng(0)
    sequences = []
    for _ in range(count):
        shared, response = generator.integers(2, 61, prompt), generator.integers(2, 61, 12)
        for sample in range(samples):
            start = response[:5] if sample >= samples // 2 else response[:0]
            tokens = np.concatenate([shared, start, generator.integers(2, 61, generator.integers(1, 10))])
            sequences.append(TokenSequence(tokens.astype(np.int32), prompt))
    return sequences


def random_batch(sequences: list[TokenSequence], seed: int = 0, *, extra_columns: int = 0) -> TrainingBatch:
    """Experience with numbers of the usual size, and NaN wherever nothing may look."""
    generator = np.random.default_rng(seed)
    shape = (len(sequences), max(sequence.response_length for sequence in sequences) + extra_columns)
    lengths = np.array([sequence.response_length for sequence in sequences])
    mask = np.arange(shape[1]) < lengths[:, None]
    holes = mask & (generator.random(shape) < 0.8)
    holes[:, 0] = True

    def column(mean: float, spread: float) -> np.ndarray:
        return np.where(mask, generator.normal(mean, spread, shape), np.nan).astype(np.float32)

    return TrainingBatch(
        sequences,
        {
            "old_logprobs": column(-4.1, 0.3), "advantages": column(0.0, 1.0), "old_values": column(0.0, 0.3),
            "returns": column(0.0, 1.0), "ref_logprobs": column(-4.1, 0.3), "importance_weights": column(1.0, 0.2),
            "action_mask": holes, "value_mask": mask,
        },
    )  # fmt: skip


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """The engine's weights by name, copied."""
    return {name: tensor.clone() for bucket in engine.weight_buckets() for name, tensor in bucket}
