"""Memory of a process of each role, computed from the shape of its model.

The layout is specific to this package: master weights, gradients and moments are float32, and bfloat16 comes from autocast,
which keeps a rounded copy of the linear weights during forward and backward. Frozen weights, the base of adapters included,
have the dtype of their checkpoint. Sharding by stage follows Rajbhandari et al. 2020 ("ZeRO"); DeepSpeed's stages 1 to 3 keep
a float32 copy of a rank's own shard next to the weights. Activations are those that autograd saves for a decoder layer like
Llama's; a test compares them with the saved tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from rayrlhf.config.section import GIB
from rayrlhf.config.train import TrainSection
from rayrlhf.models.logit_chunks import CHUNK_BYTES
from rayrlhf.tools.launch.model_shape import ModelShape

FLOAT = 4
"""Bytes of a float32."""
LOGIT_BUFFERS = 3
"""Buffers of at most that size that are alive at once in the backward pass: logits, probabilities, their gradient in compute
precision."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default size of a reduction bucket, in elements; no more than the model has."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default of parameters that ZeRO-3 keeps gathered."""
PROCESS_BYTES = int(0.9 * GIB)
"""Memory of a process without a model: CUDA context, libraries, NCCL buffers. Published figures are 0.5 to 1 GiB."""
CPU_PROCESS_BYTES = int(0.4 * GIB)
"""The same without a GPU: Python, torch, transformers, DeepSpeed, and a process group; measured."""
BASE_UTILIZATION_BYTES = GIB
"""Part of vLLM's share that is not KV cache: activations of one prefill and its workspace, as in vLLM's profiling run."""

NOT_SUMMED = ("host", "by_turns")
"""Fields of `Memory` that are on another device or part of other fields."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process on its device, by purpose."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    cache: int = 0
    overhead: int = 0
    loading: int = 0
    """Additional bytes during loading: two tensors, or the whole model where transformers computes weights from others."""
    host: int = 0
    """Main memory in addition to the device; 0 on a CPU, where both are the same."""
    by_turns: int = 0
    """Part of `total` that is on the device only while the model runs: `offload`."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(getattr(self, part.name) for part in fields(self) if part.name not in NOT_SUMMED)

    def describe(self) -> str:
        """Return the parts in GiB, largest first, without empty ones."""
        parts = sorted(
            ((getattr(self, part.name), part.name) for part in fields(self) if part.name not in NOT_SUMMED), reverse=True
        )
        return ", ".join(f"{name} {size / GIB:.2f}" for size, name in parts if size >= GIB // 200)


@dataclass(frozen=True, slots=True)
class Precision:
    """Compute precision in bytes per number: 4 for float32, 2 for bfloat16."""

    size: int

    @property
    def reduced(self) -> bool:
        """True if autocast rounds to fewer bytes than float32."""
        return self.size < FLOAT


def activation_bytes(shape: ModelShape, tokens: int, precision: Precision, *, checkpointing: bool) -> int:
    """Return the bytes that autograd saves for a forward pass, padding included.

    With H hidden, Q the queries' width, K the keys' width, I the feed-forward width, a layer saves per token, in float32:
    24 H (two norms keep input and aggregated input; the inputs of both blocks), 8 Q + 8 K (queries, keys, values and the
    attention's output) and 16 I (gate, its activation, up, their product). Under bfloat16 the norms stay float32 (16 H), each
    of the five products of a block's input keeps its own rounded copy (10 H), and the rest halves.

    With checkpointing a layer keeps its float32 input only, and one layer at a time is recomputed in full.
    """
    hidden, attention, wide = shape.hidden, shape.query + shape.key_value, shape.intermediate
    full = 24 * hidden + 8 * attention + 16 * wide
    layer = 26 * hidden + 4 * attention + 8 * wide if precision.reduced else full
    ends = 2 * FLOAT * hidden  # the last norm's input and aggregated input
    layers = shape.learned_layers
    if checkpointing:
        return tokens * (FLOAT * hidden * layers + layer + ends)
    return tokens * (layer * layers + ends)


def backward_bytes(shape: ModelShape, tokens: int, precision: Precision) -> int:
    """Return the bytes of temporary gradients in the last layer, while all activations exist.

    They are largest in the feed-forward block: those of the product and of its two factors (3 I, in compute precision), and
    those of the residual stream and its copy after the norm (2 H in float32).
    """
    return tokens * (3 * precision.size * shape.intermediate + 2 * FLOAT * shape.hidden)


def train_memory(
    shape: ModelShape,
    train: TrainSection,
    precision: Precision,
    *,
    ranks: int,
    tokens: int,
    checkpointing: bool = False,
    language: bool = True,
    states: int = 2,
    gpu: bool = True,
    chunk: int = CHUNK_BYTES,
    uncut: ModelShape | None = None,
) -> Memory:
    """Return the peak memory of one rank of a trained model.

    Args:
        shape: the model, or the part of it that ranks share with `tensor_parallel` or `expert_parallel`.
        ranks: number of ranks with equal weights; at ZeRO-3 of all.
        tokens: of one micro-batch, padding included.
        language: the model has the output layer (a separate critic has none).
        states: float32 optimizer states per parameter: 2 for Adam, 0 for SGD.
        chunk: bytes of a chunk of logits.
        uncut: the whole model, of which ZeRO-3 gives each rank an equal part.
    """
    stage = train.zero_stage
    used = _weights(shape, language=language)
    _, learned, whole = used if uncut is None else _weights(uncut, language=language)
    own = ranks if stage else 1
    master = FLOAT * -(-learned // own) if stage else 0
    own_copies = shape.adapters and shape.stored < FLOAT  # a frozen base is stored as autocast would round it
    weights = -(-whole // ranks) if stage == 3 else whole
    divided = stage == 3 and not shape.converted  # read and divided tensor by tensor
    two = 2 * (shape.stored if own_copies else FLOAT) * shape.largest
    gradients = FLOAT * (-(-learned // ranks) if stage >= 2 else learned)
    optimizer = states * FLOAT * -(-learned // own) + master
    offloaded = optimizer if train.offload_optimizer and stage else 0
    rounded = precision.size * (min(shape.linear, LIVE_ELEMENTS) if stage == 3 else shape.linear)
    rounded = rounded if precision.reduced and not own_copies else 0
    gathered = used.size * min(LIVE_ELEMENTS, used.numbers) // used.numbers if stage == 3 and ranks > 1 else 0
    bucket = FLOAT * min(BUCKET_ELEMENTS, used.learned) if ranks > 1 else 0
    logits = LOGIT_BUFFERS * _logit_bytes(shape, tokens, chunk) + precision.size * shape.output if language else 0
    process = PROCESS_BYTES if gpu else CPU_PROCESS_BYTES
    running = Memory(
        weights=weights + rounded + gathered,
        gradients=gradients + bucket,
        optimizer=optimizer - offloaded,
        activations=activation_bytes(shape, tokens, precision, checkpointing=checkpointing)
        + backward_bytes(shape, tokens, precision)
        + logits,
        overhead=process,
        host=max(two if divided else whole, offloaded),
    )
    return replace(running, loading=max(0, (weights + two if divided else whole) + process - running.total))


class _Weights(NamedTuple):
    """Numbers of a model with its adapters, of those to learn, and bytes of all."""

    numbers: int
    learned: int
    size: int


def _weights(shape: ModelShape, *, language: bool) -> _Weights:
    frozen_head = 0 if language else _head_parameters(shape)
    numbers = shape.parameters - frozen_head + (shape.trainable if shape.adapters else 0)
    learned = shape.trainable if shape.adapters else numbers
    if shape.adapters and shape.stored < FLOAT:
        return _Weights(numbers, learned, shape.frozen_bytes - shape.stored * frozen_head + FLOAT * shape.trainable)
    return _Weights(numbers, learned, FLOAT * numbers)


def cut_on_load(memory: Memory, shape: ModelShape, *, language: bool = True, gpu: bool = True) -> Memory:
    """Add the load of a model whose weights ranks share.

    Each reads the whole into main memory before it keeps its part.

    Args:
        memory: of a rank with its part.
        shape: of the whole model.
        language: the model has the output layer.
        gpu: the part is on a GPU, so that the whole is on another device.
    """
    whole = shape.frozen_bytes if shape.adapters else FLOAT * (shape.parameters - (0 if language else _head_parameters(shape)))
    running = memory.total - memory.loading
    loading = 0 if gpu else max(0, whole + CPU_PROCESS_BYTES - running)
    return replace(memory, loading=loading, host=max(memory.host, whole))


def frozen_memory(
    shape: ModelShape, precision: Precision, *, tokens: int, gpu: bool = True, chunk: int = CHUNK_BYTES
) -> Memory:
    """Return the memory of a frozen model with one layer's activations.

    Linear weights are in compute precision or that of the checkpoint, embedding and output layer in that of the checkpoint.
    """
    other = shape.linear - shape.held_linear
    weights = min(precision.size, shape.stored) * shape.held_linear + precision.size * other + shape.stored * shape.held
    weights += FLOAT * (shape.parameters - shape.linear - shape.held)
    layer = FLOAT * (4 * shape.hidden + 2 * shape.query + 2 * shape.intermediate)
    return Memory(
        weights=weights,
        activations=tokens * layer + _logit_bytes(shape, tokens, chunk) + precision.size * shape.output,
        overhead=PROCESS_BYTES if gpu else CPU_PROCESS_BYTES,
        host=shape.frozen_bytes,
    )


def in_one_process(models: Sequence[Memory]) -> Memory:
    """Return the memory of models that run sequentially in one process: weights add up."""
    largest = {part.name: max(getattr(model, part.name) for model in models) for part in fields(Memory)}
    return Memory(**{**largest, "weights": sum(model.weights for model in models)})


def offloaded_between_turns(memory: Memory) -> Memory:
    """Mark weights and activations as on the device only while the model runs."""
    return replace(memory, by_turns=memory.weights + memory.activations)


def cache_bytes_per_token(shape: ModelShape, precision: Precision) -> int:
    """Return the bytes of keys and values of one token over all layers."""
    return 2 * shape.layers * shape.key_value * precision.size


def rollout_memory(shape: ModelShape, precision: Precision, *, devices: int, cache: int) -> Memory:
    """Return the memory per device of a replica over `devices`, with `cache` bytes in total."""
    return Memory(
        weights=-(-precision.size * shape.parameters // devices),
        cache=-(-cache // devices),
        overhead=PROCESS_BYTES + BASE_UTILIZATION_BYTES,
    )


def sync_bytes(shape: ModelShape, precision: Precision) -> int:
    """Return the bytes of a weight sync to each node with a replica."""
    return shape.parameters * precision.size


def _logit_bytes(shape: ModelShape, tokens: int, chunk: int) -> int:
    """Return the bytes of a buffer of float32 logits: a chunk, or all if fewer."""
    return min(chunk, FLOAT * tokens * shape.vocabulary)


def _head_parameters(shape: ModelShape) -> int:
    """Return the parameters of a separate output layer; 0 if tied to the embedding."""
    embedding = shape.vocabulary * shape.hidden
    rest = shape.parameters - shape.linear - embedding
    return shape.output if rest >= shape.output else 0
