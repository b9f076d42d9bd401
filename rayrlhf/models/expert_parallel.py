"""Expert parallelism: the ranks of a group hold different experts, and exchange tokens.

Every rank has samples of its own, as in data parallelism (Lepikhin et al. 2020, "GShard", section 3). Each token's states are
sent to the ranks that hold its experts and back, in the forward pass and in the backward pass. So the gradient of an expert
has all tokens of the group in it already, and that of every other weight is summed over the group.

Routers are unchanged: the experts' module gets the choices and their weights, and returns the same as with all experts on one
rank.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rayrlhf.library_types import PreTrainedModel
from rayrlhf.models.direct_load import WeightShards
from rayrlhf.models.tensor_parallel import WeightSplit, is_cut

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ExpertSplit(WeightSplit):
    """Equal numbers of experts, one part per rank of a group.

    Attributes:
        step_follows: the running backward pass is the last one before an optimizer step.
    """

    key: ClassVar[str] = "expert_parallel"
    shared: ClassVar[str] = "experts"

    def __init__(self, group: "ProcessGroup", data_group: "ProcessGroup") -> None:
        super().__init__(group, data_group)
        self.step_follows = True

    def obstacle(self, model: PreTrainedModel) -> str | None:
        """See `expert_obstacle`."""
        return expert_obstacle(model, self.size)

    def cut(self, model: PreTrainedModel, shards: WeightShards | None = None) -> None:
        """Keep this rank's experts, in place; the model must have no `obstacle`."""
        for experts in expert_layers(model):
            kind = type(experts)
            experts.__class__ = type(f"Shared{kind.__name__}", (_SharedExperts, kind), {})
            experts.split = self
            experts.num_experts //= self.size
            for parameter in experts.parameters(recurse=False):
                self.keep(parameter, 0, shards)

    def sum_gradients(self, parameters: Iterable[nn.Parameter], *, always: bool) -> None:
        """Sum the accumulated gradients of whole weights over the group, from now on.

        Args:
            parameters: all of the network.
            always: in every backward pass; otherwise in the last one before a step.
        """

        def add_up(parameter: Tensor) -> None:
            if parameter.grad is not None and (always or self.step_follows):
                torch.distributed.all_reduce(parameter.grad, group=self.group)

        for parameter in parameters:
            if parameter.requires_grad and not is_cut(parameter):
                parameter.register_post_accumulate_grad_hook(add_up)  # type: ignore[no-untyped-call]

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients of experts by the ranks of the group, from now on.

        For a backend that averages those of other weights over all ranks, and those of experts over the ranks with the same.

        Args:
            parameters: all of the network.
        """
        for parameter in parameters:
            if parameter.requires_grad and is_cut(parameter):
                parameter.register_hook(lambda gradient: gradient / self.size)  # type: ignore[no-untyped-call]


def expert_obstacle(model: PreTrainedModel, size: int) -> str | None:
    """Return the reason why ranks cannot divide a model's experts, with the expected value.

    It is None if they can. The model may be on the `meta` device.
    """
    layers = expert_layers(model)
    if not layers:
        return "has no experts that ranks can share; expected 1"
    odd = next((layer.num_experts for layer in layers if layer.num_experts % size), None)
    return None if odd is None else f"has {odd} experts; expected a divisor"


def expert_layers(model: nn.Module) -> list[Any]:
    """Return the modules that hold all experts of a layer, stacked, in transformers' common form."""
    return [module for module in model.modules() if hasattr(module, "_apply_gate") and hasattr(module, "num_experts")]


class _SharedExperts(nn.Module):
    """Part of the experts of a layer, for the tokens of all ranks.

    Attributes:
        num_experts: of this rank.
    """

    split: ExpertSplit
    num_experts: int

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts.

        Args:
            hidden_states: [T, H] of this rank's tokens.
            top_k_index: int64 [T, k], experts of the whole layer.
            top_k_weights: [T, k].
        """
        group, ranks, own = self.split.group, self.split.size, self.num_experts
        chosen, order = top_k_index.flatten().sort(stable=True)
        counts = torch.bincount(chosen, minlength=ranks * own)
        incoming = torch.empty_like(counts)
        torch.distributed.all_to_all_single(incoming, counts, group=group)
        sent, received = (each.view(ranks, own).sum(1).tolist() for each in (counts, incoming))
        states = _exchanged(hidden_states[order // top_k_index.shape[1]], sent, received, group)
        experts = torch.arange(own, device=chosen.device).repeat(ranks).repeat_interleave(incoming)
        # One row of zeros, so that a rank without tokens makes the same backward pass as the others.
        states = torch.cat([states, states.new_zeros(1, states.shape[1])])
        experts = torch.cat([experts, experts.new_zeros(1)])[:, None]
        outputs = super().forward(states, experts, torch.ones_like(experts, dtype=top_k_weights.dtype))[:-1]
        returned = _exchanged(outputs, received, sent, group)[order.argsort()]
        weighted = returned.view(*top_k_index.shape, -1) * top_k_weights[..., None]
        return weighted.sum(1).to(hidden_states.dtype)


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    return cast(Tensor, _Exchange.apply(rows, sent, received, group))  # type: ignore[no-untyped-call]


class _Exchange(torch.autograd.Function):
    """Exchange of rows [T, H] between ranks, whose gradients go back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        found = rows.new_empty(sum(received), rows.shape[1])
        torch.distributed.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(gradients[0], ctx.received, ctx.sent, ctx.group), None, None, None  # type: ignore[no-untyped-call]
