"""Tensor parallelism: the ranks of a group hold different parts of the same weights.

Linear layers that read the residual stream are cut by output features, those that write to it by input features, so that
between them a rank has heads or feed-forward columns of its own (Shoeybi et al. 2019, "Megatron-LM", section 3). The model's
`tp_plan` in transformers lists both kinds. The forward pass sums the written parts over the ranks, and the backward pass sums
the gradients at the read inputs.

Embedding and output layer are cut by rows of the vocabulary. Looked up rows are summed over the ranks, and log-probs combine
numbers of each rank (`rayrlhf.models.logprobs`), so no rank has logits of the whole vocabulary. Both stay whole if the
vocabulary is not divisible by the ranks, or if the model has custom layers for them. Value head and norms stay whole. Every
rank computes the same with them, and losses are unchanged. Norms within single heads read the heads of one rank only, so their
gradients are summed over the ranks.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from rayrlhf.library_types import PreTrainedModel
from rayrlhf.models.direct_load import WeightShards
from rayrlhf.models.held_weights import HeldEmbedding, HeldLinear, product
from rayrlhf.models.logprobs import VocabularyPart
from rayrlhf.models.rank_group import RankGroup

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CUT = {"colwise": 0, "rowwise": 1}
"""Dimension of the weight that is cut, by the style's name in `tp_plan`."""
_SUMMED = "replicated_with_grad_allreduce"


class _Planned(NamedTuple):
    """A module in a model's `tp_plan`."""

    name: str
    module: nn.Module
    style: str


class WeightSplit(RankGroup):
    """Equal parts of the weights of linear layers, one per rank of a group.

    Attributes:
        key: name of the setting.
        shared: parts of the model that ranks hold in parts.
        data_group: ranks of the world that hold the same parts.
    """

    key: ClassVar[str] = "tensor_parallel"
    shared: ClassVar[str] = "weights"

    def __init__(self, group: "ProcessGroup", data_group: "ProcessGroup") -> None:
        super().__init__(group)
        self.data_group = data_group

    def obstacle(self, model: PreTrainedModel) -> str | None:
        """See `obstacle`."""
        return obstacle(model, self.size)

    def cut(self, model: PreTrainedModel, shards: WeightShards | None = None) -> None:
        """Keep this rank's part of the weights, in place; the model must have no `obstacle`.

        Args:
            model: whole, or divided by `shards`.
            shards: divide each part over the ranks that hold the same one.
        """
        for _, module, style in list(_planned(model)):
            if style == _SUMMED:
                for parameter in module.parameters():
                    if parameter.requires_grad:
                        parameter.register_hook(partial(_summed, group=self.group))  # type: ignore[no-untyped-call]
                continue
            for linear in _linear_layers(module, style):
                self._cut(linear, _CUT[style], shards)
        for end in _vocabulary_layers(model, self.size):
            self._cut(end, 0, shards)

    def _cut(self, layer: nn.Linear | nn.Embedding, dim: int, shards: WeightShards | None) -> None:
        cut_class = VocabularyEmbedding if isinstance(layer, nn.Embedding) else RowLinear if dim else ColumnLinear
        layer.__class__ = cut_class
        layer.split = self  # type: ignore[assignment]
        for name, parameter in layer.named_parameters(recurse=False):
            if is_cut(parameter) or (name == "bias" and dim):
                continue  # tied, or added once to the sum
            self.keep(parameter, dim, shards)

    def keep(self, parameter: nn.Parameter, dim: int, shards: WeightShards | None) -> None:
        """Keep this rank's part of a parameter, cut along a dimension."""

        def part(whole: Tensor) -> Tensor:
            return whole.chunk(self.size, dim)[self.rank]

        if shards is None:
            parameter.data = part(parameter.detach()).clone()
        else:
            shards.narrow(parameter, part, self.data_group)
        marked = cast(Any, parameter)  # the first name is Megatron's, by which DeepSpeed knows such parameters
        marked.tensor_model_parallel, marked.partition_dim, marked.partitions = True, dim, self.size

    @torch.no_grad()
    def whole(self, parameter: nn.Parameter, part: Tensor) -> Tensor:
        """Gather a tensor that is cut as a parameter is.

        It is returned as it is if the parameter is whole.
        """
        if not is_cut(parameter):
            return part
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        torch.distributed.all_gather(parts, part.detach().contiguous(), group=self.group)
        return torch.cat(parts, dim=cast(Any, parameter).partition_dim)

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the whole gradient."""
        by_kind = [[one.grad for one in parameters if one.grad is not None and is_cut(one) == cut] for cut in (True, False)]
        device = parameters[0].device
        cut, whole = (torch.nn.utils.get_total_norm(gradients).square().to(device) for gradients in by_kind)
        torch.distributed.all_reduce(cut, group=self.group)
        return (cut + whole).sqrt()


def is_cut(parameter: Tensor) -> bool:
    """Return True if this rank holds a part of the parameter."""
    return hasattr(parameter, "partition_dim")


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of a parameter that may be cut or divided."""
    shape = list(getattr(parameter, "ds_shape", parameter.shape))
    if is_cut(parameter):
        shape[cast(Any, parameter).partition_dim] *= cast(Any, parameter).partitions
    return torch.Size(shape)


def obstacle(model: PreTrainedModel, size: int) -> str | None:
    """Return the reason why weights cannot be split, with the expected value.

    It is None if they can be cut. The model may be on the `meta` device.
    """
    planned = list(_planned(model))
    if any("expert" in name for name, _ in model.named_modules()):
        return "has experts, which are not cut; expected 1"
    for name, module, style in planned:
        known = style in _CUT and all(isinstance(one, nn.Linear) for one in _linear_layers(module, style))
        if not known and style != _SUMMED:
            return f"cuts {name.rpartition('.')[2]} in another way ({style}); expected 1"
    if not any(style in _CUT for _, _, style in planned):
        return "has no plan in transformers by which its layers are cut (tp_plan); expected 1"
    text = model.config.get_text_config()
    heads = int(text.num_attention_heads)
    key_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    if heads % size or key_heads % size:
        return f"has {heads} heads and {key_heads} key heads; expected a divisor of both"
    for name, module, style in planned:
        for linear in _linear_layers(module, style) if style in _CUT else ():
            if (features := whole_shape(linear.weight)[_CUT[style]]) % size:
                return f"has {features} features in {name.rpartition('.')[2]}; expected a divisor"
    return None


def _planned(model: PreTrainedModel) -> Iterator[_Planned]:
    """Yield the modules of a model's plan but embedding and output layer."""
    plan = [(re.compile(re.escape(key).replace(r"\*", r"\d+")), style) for key, style in (model.tp_plan or {}).items()]
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for name, module in model.named_modules():
        style = next((style for pattern, style in plan if pattern.fullmatch(name)), None)
        if style is not None and id(module) not in ends:
            yield _Planned(name, module, style)


def _vocabulary_layers(model: PreTrainedModel, size: int) -> list[Any]:
    """Return embedding and output layer if both can be cut by rows, otherwise none."""
    ends = [one for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None]
    plain = all(type(one) in (nn.Embedding, HeldEmbedding, nn.Linear, HeldLinear) for one in ends)
    return ends if plain and all(whole_shape(one.weight)[0] % size == 0 for one in ends) else []


def vocabulary_part(head: nn.Module) -> VocabularyPart | None:
    """Return this rank's rows of an output layer; None if it has all."""
    split = getattr(head, "split", None)
    return None if split is None else VocabularyPart(split.group, split.rank * len(cast(Tensor, head.weight)))


def whole_layer(head: Any) -> tuple[Tensor, Tensor | None]:
    """Gather weight and bias of an output layer; gradients reach the own rows."""
    split = getattr(head, "split", None)
    if split is None:
        return head.weight, head.bias
    return tuple(None if one is None else _Gather.apply(one, split) for one in (head.weight, head.bias))  # type: ignore


def _linear_layers(module: nn.Module, style: str) -> list[nn.Linear]:
    """Return the layers to cut of a planned module.

    They are itself, or its base and the adapters on the side of the cut.
    """
    if not hasattr(module, "base_layer"):
        return [cast(nn.Linear, module)]
    adapted = cast(Any, module)
    return [adapted.base_layer, *(adapted.lora_A if _CUT[style] else adapted.lora_B).values()]


class ColumnLinear(nn.Linear):
    """Linear layer with this rank's output features, from whole inputs."""

    split: WeightSplit

    def forward(self, input: Tensor) -> Tensor:
        """Return this rank's features of the product."""
        entered = cast(Tensor, _Enter.apply(input, self.split.group))  # type: ignore[no-untyped-call]
        return product(entered, self.weight, self.bias)


class RowLinear(nn.Linear):
    """Linear layer with this rank's input features, to whole outputs."""

    split: WeightSplit

    def forward(self, input: Tensor) -> Tensor:
        """Return the product, summed over the ranks."""
        part = product(input, self.weight, None)
        total = cast(Tensor, _Sum.apply(part, self.split.group))  # type: ignore[no-untyped-call]
        return total if self.bias is None else total + self.bias.to(total.dtype)


class VocabularyEmbedding(nn.Embedding):
    """Embedding with this rank's rows of the vocabulary."""

    split: WeightSplit

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of the tokens, from all ranks; in float32 as from `HeldEmbedding`."""
        rows = len(self.weight)
        first = self.split.rank * rows
        own = (input >= first) & (input < first + rows)
        pad = None if self.padding_idx is None else self.padding_idx - first
        found = nn.functional.embedding(
            (input - first).clamp(0, rows - 1), self.weight, pad if pad is not None and 0 <= pad < rows else None
        )
        return cast(Tensor, _Sum.apply(found.float() * own[..., None], self.split.group))  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    """All-gather of rows.

    All ranks compute one loss from them, so the backward pass keeps the gradient at the own rows.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, split: WeightSplit) -> Tensor:
        ctx.split = split
        parts = [torch.empty_like(part) for _ in range(split.size)]
        torch.distributed.all_gather(parts, part.contiguous(), group=split.group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].chunk(ctx.split.size)[ctx.split.rank], None


class _Enter(torch.autograd.Function):
    """Identity whose gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], group=ctx.group), None


class _Sum(torch.autograd.Function):
    """Sum over the ranks, which compute one loss from it: each passes its gradient on."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        return _summed(part, group=group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _summed(part: Tensor, *, group: Any) -> Tensor:
    """Return the sum over the ranks, the same bits on each."""
    total = part.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=group)
    return total
