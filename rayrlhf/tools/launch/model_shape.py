"""Parameter counts and widths of a model, from its architecture on the `meta` device.

Counting the parameters of a network that is built without memory is exact for every architecture, while a formula is exact for
one.
"""

import re
from dataclasses import dataclass, replace

from rayrlhf.config.model import LoraSection, ModelSection
from rayrlhf.library_types import PreTrainedModel

_LAYER = re.compile(r"\.layers\.(\d+)\.|\.h\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Parameter counts and widths of one model.

    Attributes:
        parameters: of the whole checkpoint, tied tensors once.
        linear: of linear layers except the output layer.
        output: of the output layer, tied or not.
        experts: of the experts that ranks can share.
        trainable: all parameters, or those of the adapters.
        stored: bytes of a number in the checkpoint, 2 or 4.
        held_linear: the part of `linear` that is held in the checkpoint's dtype where it is frozen (`models/held_weights`).
        held: the same of embedding and output layer.
        largest: of the largest tensor.
        converted: transformers computes weights from others on load, so that each process loads all of them.
        hidden: width of the residual stream.
        heads: number of query heads, and of key heads.
        query: width of all query heads together.
        key_value: width of all key heads together (the values have the same).
        intermediate: width of the feed-forward layer.
        vocabulary: number of tokens.
        context: maximum sequence length in tokens.
        learned_layers: decoder layers that the backward pass reaches.
    """

    parameters: int
    linear: int
    output: int
    experts: int
    trainable: int
    stored: int
    held_linear: int
    held: int
    largest: int
    converted: bool
    layers: int
    hidden: int
    heads: tuple[int, int]
    query: int
    key_value: int
    intermediate: int
    vocabulary: int
    context: int
    learned_layers: int

    @property
    def adapters(self) -> bool:
        """True if only adapters are trained."""
        return self.trainable < self.parameters

    @property
    def frozen_bytes(self) -> int:
        """Bytes of all weights without masters."""
        held = self.held + self.held_linear
        return self.stored * held + 4 * (self.parameters - held)


def read_shape(model: ModelSection) -> ModelShape:
    """Read a model's shape from its configuration alone.

    Raises:
        UserError: no model can be loaded from the path.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from rayrlhf.models.load import load_architecture

    architecture = load_architecture(model)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(architecture, trust_remote_code=model.trust_remote_code)
    return shape_of(network, model.lora)


def shape_of(network: PreTrainedModel, lora: LoraSection | None = None) -> ModelShape:
    """Return the shape of a causal language model, possibly on the `meta` device.

    Args:
        network: the model with its output layer.
        lora: adapters; None trains all parameters.
    """
    from torch import nn

    from rayrlhf.models.expert_parallel import expert_layers
    from rayrlhf.models.held_weights import HALVES, holdable
    from rayrlhf.models.stacked_weights import only_stacks

    text = network.config.get_text_config()
    head = network.get_output_embeddings()
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear) and module is not head}
    parameters = sum(parameter.numel() for parameter in network.parameters())
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = int(text.num_hidden_layers)
    held = {key: parameter.numel() for key, parameter in holdable(network).items()}
    held_linear = sum(held.get(id(module.weight), 0) for module in linear.values())
    adapted = None if lora is None else {name: module for name, module in linear.items() if _is_adapted(name, lora, layers)}
    return ModelShape(
        parameters=parameters,
        linear=sum(module.weight.numel() for module in linear.values()),
        output=head.weight.numel(),
        experts=sum(parameter.numel() for layer in expert_layers(network) for parameter in layer.parameters()),
        trainable=parameters
        if lora is None or adapted is None
        else lora.rank * sum(module.in_features + module.out_features for module in adapted.values()),
        stored=2 if network.config.dtype in (*HALVES, "bfloat16", "float16") else 4,
        held_linear=held_linear,
        held=sum(held.values()) - held_linear,
        largest=max(parameter.numel() for parameter in network.parameters()),
        converted=not only_stacks(network),
        layers=layers,
        hidden=int(text.hidden_size),
        heads=(heads, key_heads),
        query=heads * head_size,
        key_value=key_heads * head_size,
        intermediate=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        vocabulary=int(text.vocab_size),
        context=int(getattr(text, "max_position_embeddings", None) or 2048),
        learned_layers=layers if lora is None or lora.last_layers is None else min(lora.last_layers, layers),
    )


def cut_shape(shape: ModelShape, size: int, expert_parallel: int = 1) -> ModelShape:
    """Return the shape of a rank's part of a model whose weights ranks share.

    See `models/tensor_parallel` and `models/expert_parallel`. Linear layers, experts, embedding and output layer are cut; their
    few biases and adapters count as whole.
    """
    rows = size if shape.vocabulary % size == 0 else 1
    embedding = shape.vocabulary * shape.hidden
    ends = embedding if _is_tied(shape) else embedding + shape.output
    linear, held = -(-shape.linear // size), -(-shape.held_linear // size)
    experts = shape.experts // expert_parallel
    parameters = shape.parameters - shape.linear + linear - shape.experts + experts - ends + ends // rows
    return replace(
        shape,
        parameters=parameters,
        linear=linear,
        output=shape.output // rows,
        vocabulary=shape.vocabulary // rows,
        experts=experts,
        trainable=shape.trainable if shape.adapters else parameters,
        held_linear=held,
        held=shape.held // rows,
        query=shape.query // size,
        key_value=shape.key_value // size,
        intermediate=-(-shape.intermediate // size),
    )


def stage_shape(shape: ModelShape, stages: int) -> ModelShape:
    """Return the shape of the largest stage of a pipeline.

    It has its part of the layers, and embedding or output layer.
    """
    if stages == 1:
        return shape
    embedding, layers = shape.vocabulary * shape.hidden, -(-shape.layers // stages)
    ends = embedding if _is_tied(shape) else embedding + shape.output
    inner = -(-(shape.parameters - ends) * layers // shape.layers)
    return replace(shape, parameters=inner + max(embedding, shape.output), layers=layers)


def _is_tied(shape: ModelShape) -> bool:
    return shape.parameters - shape.linear - shape.vocabulary * shape.hidden < shape.output


def _is_adapted(name: str, lora: LoraSection, layers: int) -> bool:
    if lora.target_modules != "all-linear" and name.rpartition(".")[2] not in lora.target_modules:
        return False
    found = _LAYER.search(f".{name}.")
    layer = int(next(filter(None, found.groups()))) if found else 0
    return lora.last_layers is None or layer >= layers - lora.last_layers
