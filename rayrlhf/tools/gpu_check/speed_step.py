"""Speed of a training step on random weights in the shape of Qwen3-0.6B.

prime-rl publishes 11.9k and 10.1k tokens/s and a model FLOPs utilization (MFU) of 11.1 % and 26.8 % for this model on one H100
with rows of 16k and 64k tokens. Its operations are those of `bench.operations` for a row that is one sample: 6 per weight and
token, causal attention over the whole row, nothing for recomputed activations.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from rayrlhf.config.model import ModelSection
from rayrlhf.config.policy_loss import PPOLossSection
from rayrlhf.config.section import GIB
from rayrlhf.config.train import TrainSection
from rayrlhf.engines.objectives.policy import PolicyObjective
from rayrlhf.engines.train.engine import TrainEngine
from rayrlhf.engines.train.plan import UpdatePlan
from rayrlhf.engines.train.process_group import join_alone
from rayrlhf.engines.train.spec import TrainEngineSpec
from rayrlhf.library_types import PretrainedConfig
from rayrlhf.tools.bench.operations import Lengths, forward_operations
from rayrlhf.tools.gpu_check.random_work import random_experience, random_sequences, timed
from rayrlhf.tools.gpu_check.step_result import Figure
from rayrlhf.tools.launch.model_shape import ModelShape, read_shape

PUBLISHED = {16_384: (11_900.0, 11.1), 65_536: (10_100.0, 26.8)}
"""prime-rl's tokens/s and MFU in percent on one H100, by tokens of a row."""
PEAKS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12, "H800": 989e12, "A100": 312e12,
    "B200": 2250e12,
}  # fmt: skip
"""Dense bfloat16 operations per second of NVIDIA's data sheets, by a part of the device's name; the first match counts."""
LONG_ROW_BYTES = 48 * GIB
"""Memory of a GPU from which 64k tokens are tried."""
PROMPT = 8
LONG_ROW = 32_768


def qwen3_shape(context: int, *, tiny: bool = False) -> PretrainedConfig:
    """Return Qwen3-0.6B's configuration, or that of a tiny model of the family."""
    from transformers import Qwen3Config

    hidden, wide, layers, heads, head_dim, vocabulary = (64, 96, 2, 4, 16, 512) if tiny else (1024, 3072, 28, 16, 128, 151_936)
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=head_dim,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def speed(device: torch.device) -> Iterator[Figure]:
    """Measure tokens/s, operations per second and MFU of an optimizer step."""
    tiny = device.type == "cpu"
    rows = (64, 128) if tiny else tuple(PUBLISHED)
    join_alone("gloo" if tiny else "nccl")
    with tempfile.TemporaryDirectory() as folder:
        write_random(qwen3_shape(max(rows), tiny=tiny), Path(folder), device)
        shape = read_shape(ModelSection(path=folder))
        for row in rows:
            if not tiny and row == max(rows) and torch.cuda.get_device_properties(device).total_memory < LONG_ROW_BYTES:
                yield Figure(f"training step of {row:,} tokens", f"not measured: less than {LONG_ROW_BYTES / GIB:.0f} GiB")
                continue
            seconds = _step_seconds(folder, row, shape.vocabulary, device)
            yield from speed_figures(shape, row, seconds, "" if tiny else torch.cuda.get_device_name(device))


def write_random(config: PretrainedConfig, folder: Path, device: torch.device) -> None:
    """Write a model with random weights, drawn on the device, in bfloat16."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def _step_seconds(folder: str, row: int, vocabulary: int, device: torch.device) -> float:
    """Return the seconds of one optimizer step on one row."""
    model = ModelSection(path=folder, dtype="bfloat16", gradient_checkpointing=True)
    train = TrainSection(micro_batch_tokens=row)
    engine = TrainEngine(TrainEngineSpec(model, frozenset({"lm"}), train, learning_rate=1e-6, packing=True))
    batch = random_experience(random_sequences([row], prompt=PROMPT, vocabulary=vocabulary), vocabulary=vocabulary)
    objective, plan = PolicyObjective(PPOLossSection()), UpdatePlan([[[0]]])
    return timed(device, lambda: engine.update(batch, plan, objective), rounds=1 if row > LONG_ROW else 3)


def speed_figures(shape: ModelShape, row: int, seconds: float, device_name: str) -> Iterator[Figure]:
    """Yield tokens/s, TFLOP/s and, for known devices, MFU of an optimizer step on one row."""
    published = PUBLISHED.get(row)
    words = [f"prime-rl, 1 x H100: {value:,g}" for value in published] if published else ["", ""]
    rate = step_operations(shape, row) / seconds
    yield Figure(f"training step of {row:,} tokens", row / seconds, "tokens/s", headline=True, published=words[0])
    yield Figure(f"operations at {row:,} tokens", rate / 1e12, "TFLOP/s", headline=True)
    peak = next((peak for part, peak in PEAKS.items() if part in device_name), None)
    if peak is not None:
        yield Figure(f"MFU at {row:,} tokens", 100 * rate / peak, "%", headline=True, published=words[1])


def step_operations(shape: ModelShape, row: int) -> float:
    """Return the floating-point operations of forward and backward of one row that is one sample."""
    return 3 * forward_operations(shape, Lengths([PROMPT], [row - PROMPT]), outputs=True)
