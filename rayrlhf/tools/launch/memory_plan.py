"""How much memory a process of each role takes, from the numbers of its model alone.

Everything is counted as this project holds it, which is not how every trainer does: master weights, gradients and moments are
float32, and bfloat16 comes from autocast, which keeps a rounded copy of the linear weights during forward and backward. What is
sharded by which stage follows Rajbhandari et al. 2020 ("ZeRO"); DeepSpeed's stages 1 to 3 keep a float32 copy of a rank's own
part beside the weights. Activations are those that autograd saves for a decoder layer of Llama's kind; a test holds them to
what it really saves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from rayrlhf.config.train import TrainSection
from rayrlhf.config.units import GIB
from rayrlhf.tools.launch.model_shape import ModelShape

FLOAT = 4
"""Bytes of a float32."""
LOGIT_BYTES = 24 * 2**20
"""`rayrlhf.models.logprobs.CHUNK_BYTES`, repeated here because that module brings torch; a test compares them."""
LOGIT_BUFFERS = 3
"""Buffers of that size, or of all logits where they are fewer, alive at once in the backward pass: logits, probabilities, their
gradient in compute precision."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default size of a reduction bucket, in elements; no more than the model has."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default of parameters that ZeRO-3 keeps gathered."""
PROCESS_BYTES = int(0.9 * GIB)
"""What a process takes before it has a model: CUDA context, libraries, NCCL buffers. Published figures lie at 0.5 to 1 GiB."""
CPU_PROCESS_BYTES = int(0.4 * GIB)
"""The same without a GPU: Python, torch, transformers, DeepSpeed, and a process group; measured."""
BASE_UTILIZATION_BYTES = GIB
"""What vLLM's own profiling run takes out of its share before the KV cache: activations of one prefill and its workspace."""

NOT_SUMMED = ("host", "by_turns")
"""Fields of `Memory` that lie elsewhere, or are told by other fields."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process on its device, by what they are for."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    cache: int = 0
    overhead: int = 0
    loading: int = 0
    """What loading takes beyond all of the above: a rank moves the whole float32 model to its device before it is sharded."""
    host: int = 0
    """Main memory beside the device; on a CPU, where both are the same, nothing."""
    by_turns: int = 0
    """Of `total`, what the process holds only while it is its turn: `offload`."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(getattr(self, part.name) for part in fields(self) if part.name not in NOT_SUMMED)

    def describe(self) -> str:
        """The parts in GiB, largest first, those of nothing left out."""
        parts = sorted(
            ((getattr(self, part.name), part.name) for part in fields(self) if part.name not in NOT_SUMMED), reverse=True
        )
        return ", ".join(f"{name} {size / GIB:.2f}" for size, name in parts if size >= GIB // 200)


@dataclass(frozen=True, slots=True)
class Precision:
    """Compute precision: bytes of one number, 4 for float32 and 2 for bfloat16."""

    size: int

    @property
    def reduced(self) -> bool:
        """Whether autocast rounds anything."""
        return self.size < FLOAT


def activation_bytes(shape: ModelShape, tokens: int, precision: Precision, *, checkpointing: bool) -> int:
    """Bytes that autograd saves for one forward of `tokens` tokens, padding included.

    With H hidden, Q the queries' width, K the keys' width, I the feed-forward width, a layer saves per token, in float32:
    24 H (two norms keep input and aggregated input; the inputs of both blocks), 8 Q + 8 K (queries, keys, values and the
    attention's output) and 16 I (gate, its activation, up, their product). Under bfloat16 the norms stay float32 (16 H), each
    of the five products of a block's input keeps a rounded copy of its own (10 H), and the rest halves.

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
    """Bytes of gradients in flight when the backward pass is in the last layer, where all activations are still there.

    In the feed-forward block they are largest: those of the product and of its two factors (3 I, in compute precision), beside
    that of the residual stream and its copy after the norm (2 H in float32).
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
) -> Memory:
    """Memory of one rank of a model that learns, at its peak.

    Args:
        shape: the model.
        train: ZeRO stage and offloading.
        precision: compute precision.
        ranks: data-parallel ranks.
        tokens: of one micro-batch, padding included.
        checkpointing: whether activations are recomputed.
        language: whether it has the output layer (a separate critic has none).
        states: float32 numbers the optimizer keeps per parameter: 2 for Adam, 0 for SGD.
        gpu: whether the rank has one.
    """
    stage = train.zero_stage
    frozen_head = 0 if language else _head_parameters(shape)
    everything = shape.parameters - frozen_head + (shape.trainable if shape.adapters else 0)
    learned = shape.trainable if shape.adapters else everything
    own = ranks if stage else 1
    master = FLOAT * -(-learned // own) if stage else 0
    weights = FLOAT * (-(-everything // ranks) if stage == 3 else everything)
    gradients = FLOAT * (-(-learned // ranks) if stage >= 2 else learned)
    optimizer = states * FLOAT * -(-learned // own) + master
    offloaded = optimizer if train.offload_optimizer and stage else 0
    rounded = precision.size * (min(shape.linear, LIVE_ELEMENTS) if stage == 3 else shape.linear) if precision.reduced else 0
    gathered = FLOAT * min(LIVE_ELEMENTS, everything) if stage == 3 and ranks > 1 else 0
    bucket = FLOAT * min(BUCKET_ELEMENTS, learned) if ranks > 1 else 0
    logits = LOGIT_BUFFERS * _logit_bytes(shape, tokens) + precision.size * shape.output if language else 0
    process = PROCESS_BYTES if gpu else CPU_PROCESS_BYTES
    running = Memory(
        weights=weights + rounded + gathered,
        gradients=gradients + bucket,
        optimizer=optimizer - offloaded,
        activations=activation_bytes(shape, tokens, precision, checkpointing=checkpointing)
        + backward_bytes(shape, tokens, precision)
        + logits,
        overhead=process,
        host=max(FLOAT * everything, offloaded),
    )
    whole = FLOAT * everything + process
    return replace(running, loading=max(0, whole - running.total))


def frozen_memory(shape: ModelShape, precision: Precision, *, tokens: int, gpu: bool = True) -> Memory:
    """Memory of a model that is only read: linear weights in compute precision, the rest float32, one layer's activations."""
    weights = precision.size * shape.linear + FLOAT * (shape.parameters - shape.linear)
    layer = FLOAT * (4 * shape.hidden + 2 * shape.query + 2 * shape.intermediate)
    return Memory(
        weights=weights,
        activations=tokens * layer + _logit_bytes(shape, tokens) + precision.size * shape.output,
        overhead=PROCESS_BYTES if gpu else CPU_PROCESS_BYTES,
        host=FLOAT * shape.parameters,
    )


def in_one_process(models: Sequence[Memory]) -> Memory:
    """Memory of models that one process loads and reads one after the other: all weights, the largest of the rest."""
    largest = {part.name: max(getattr(model, part.name) for model in models) for part in fields(Memory)}
    return Memory(**{**largest, "weights": sum(model.weights for model in models)})


def waiting_between_turns(memory: Memory) -> Memory:
    """The same where weights wait in main memory between turns: only what a process always takes is always on the device."""
    return replace(memory, by_turns=memory.weights + memory.activations)


def cache_bytes_per_token(shape: ModelShape, precision: Precision) -> int:
    """Keys and values of one token over all layers."""
    return 2 * shape.layers * shape.key_value * precision.size


def rollout_memory(shape: ModelShape, precision: Precision, *, devices: int, cache: int) -> Memory:
    """Memory of one device of a replica that spans `devices`, with `cache` bytes of keys and values over all of them."""
    return Memory(
        weights=-(-precision.size * shape.parameters // devices),
        cache=-(-cache // devices),
        overhead=PROCESS_BYTES + BASE_UTILIZATION_BYTES,
    )


def sync_bytes(shape: ModelShape, precision: Precision) -> int:
    """Bytes of the merged checkpoint that a weight sync sends, once to every node with a replica."""
    return shape.parameters * precision.size


def _logit_bytes(shape: ModelShape, tokens: int) -> int:
    """One buffer of float32 logits: a chunk, or all that there are."""
    return min(LOGIT_BYTES, FLOAT * tokens * shape.vocabulary)


def _head_parameters(shape: ModelShape) -> int:
    """Parameters that go with the output layer: none where it is the embedding, which stays."""
    embedding = shape.vocabulary * shape.hidden
    rest = shape.parameters - shape.linear - embedding
    return shape.output if rest >= shape.output else 0
