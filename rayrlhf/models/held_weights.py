"""Frozen weights in the dtype of their checkpoint.

A weight that is not trained needs no float32 master: a bfloat16 checkpoint has all of its information. Linear layers and
embeddings keep that dtype, at half the memory. Results are those of float32 weights bit for bit: autocast would round the
weights to the same bits in every use, and without autocast the weight is converted to float32 for one product, or the found
rows for one lookup.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)
"""Dtypes of which float32 holds every number."""


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a linear layer's product in autocast's dtype, or in the input's.

    Args:
        inputs: [..., in features].
        weight: [out features, in features], possibly in 16 bits.
        bias: [out features] or None.
    """
    if torch.is_autocast_enabled(inputs.device.type) or inputs.dtype == weight.dtype:
        return nn.functional.linear(inputs, weight, bias)
    return cast(Tensor, _WidenedProduct.apply(inputs, weight, bias))  # type: ignore[no-untyped-call]


class HeldLinear(nn.Linear):
    """Linear layer with a frozen 16-bit weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product in autocast's dtype, or in the input's."""
        return product(input, self.weight, self.bias)


class HeldEmbedding(nn.Embedding):
    """Embedding with a frozen 16-bit weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Return float32 rows, so that the residual stream has the precision of any other model's."""
        return super().forward(input).float()


_HELD: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: HeldLinear, nn.Embedding: HeldEmbedding}
"""Layers that may hold 16 bits. A subclass may read the dtype of its weight, as Gemma's embedding does."""


def holdable(network: nn.Module) -> dict[int, nn.Parameter]:
    """Return the parameters that may be held in 16 bits, by id.

    Every layer that has one must be able to. None of state-space models, whose kernels read the weights of linear layers.
    """
    if getattr(network, "_is_stateful", False):
        return {}
    held: dict[int, nn.Parameter] = {}
    elsewhere: set[int] = set()
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and type(module) in _HELD:
                held[id(parameter)] = parameter
            else:
                elsewhere.add(id(parameter))
    return {key: parameter for key, parameter in held.items() if key not in elsewhere}


def hold(network: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen weights of a whole float32 network in the dtype of its checkpoint.

    Weights that this would change stay as they are.

    Args:
        network: frozen parameters only are held.
        dtype: of the checkpoint; other than 16-bit floats change nothing.
    """
    if dtype in HALVES:
        for parameter in holdable(network).values():
            narrow = parameter.detach().to(dtype)
            if not parameter.requires_grad and torch.equal(narrow.float(), parameter.detach()):
                parameter.data = narrow
    widen_in_use(network)


def widen_in_use(network: nn.Module) -> None:
    """Make the layers with frozen 16-bit weights compute the same as with float32 weights."""
    for module in network.modules():
        if type(module) in _HELD and cast(Tensor, module.weight).dtype in HALVES:
            module.__class__ = _HELD[type(module)]


class _WidenedProduct(torch.autograd.Function):
    """Product with a 16-bit weight, kept as it is for the backward pass.

    Autograd would keep the wide copy.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(inputs, weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.to(gradients[0].dtype), None, None
