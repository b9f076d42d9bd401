"""Load of experts by layer, and the auxiliary loss that balances it.

The loss is transformers' `load_balancing_loss_func` (Fedus et al. 2022, "Switch Transformers", equations 4 to 6): E x sum over
experts e of f_e x P_e. f_e is the share of tokens that chose an expert, P_e its mean router probability, both over the tokens
of all layers of a micro-batch, prompts included and padding not. It is k with k experts per token and an even load.

A micro-batch is that of one data rank, as in transformers and in Megatron-LM: ranks that share experts have samples of their
own, and ranks that share rows sum over the group. In an optimizer step each micro-batch is weighted by its share of the
tokens. Choices are the routers' own, even if others are replayed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rayrlhf.config.model import ModelSection
from rayrlhf.errors import UserError
from rayrlhf.library_types import PretrainedConfig
from rayrlhf.models.load import load_architecture
from rayrlhf.models.sequence_parallel import RowSplit


def has_load(config: PretrainedConfig) -> bool:
    """Return True for families whose routers transformers balances by this loss."""
    text = config.get_text_config()
    return hasattr(text, "router_aux_loss_coef") and bool(getattr(text, "num_experts_per_tok", None))


def check_router_loss(model: ModelSection, coefficient: float) -> None:
    """Check, before weights load, that `train.router_aux_loss_coefficient` has an effect.

    Raises:
        UserError: it is set for a model without routers.
    """
    config = load_architecture(model)
    if coefficient and not has_load(config):
        raise UserError(
            f"train.router_aux_loss_coefficient {coefficient:g}: a {config.model_type} model ({model.path}) has no routers "
            "with a load-balancing loss in transformers; expected 0"
        )


class RouterLoad:
    """Sums over the tokens of a forward; collects those of a trunk's calls.

    Args:
        config: of the model.
        split: ranks that share the rows, or None.
    """

    def __init__(self, config: PretrainedConfig, split: RowSplit | None) -> None:
        self._chosen, self._split = int(config.get_text_config().num_experts_per_tok), split
        self._calls: list[Tensor] = []

    def add(self, logits: Sequence[Tensor], rows: Tensor, lengths: Sequence[int], *, packed: bool) -> None:
        """Add a call.

        Args:
            logits: of each layer [tokens, E].
            rows: the tokens [B, L].
            lengths: tokens of each sample without padding.
            packed: rows have no padding.
        """
        sizes = torch.tensor([rows.shape[1]] if packed else lengths, device=rows.device)[:, None]
        real = torch.arange(rows.shape[1], device=rows.device) < sizes
        if self._split is not None:
            real = self._split.own(real)
        kept = real.flatten().nonzero().flatten()
        layers = [layer.index_select(0, kept) for layer in logits]
        self._calls.append(torch.stack([_sums(layer, self._chosen) for layer in layers], 1))

    def total(self) -> Tensor | None:
        """Return choices and probabilities by layer and expert, float32 [2, layers, E].

        Gradients reach the own tokens. It is None without a call.
        """
        if not self._calls:
            return None
        own = torch.stack(self._calls).sum(0)
        if self._split is None:
            return own
        every = own.detach().clone()
        torch.distributed.all_reduce(every, group=self._split.group)
        return own + (every - own.detach())


def _sums(logits: Tensor, chosen: int) -> Tensor:
    """Return choices and probabilities of a layer [tokens, E], summed over tokens, [2, E]."""
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    choices = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(chosen, dim=-1).indices, 1.0)
    return torch.stack([choices.sum(0), probabilities.sum(0)])


def load_balancing_loss(load: Tensor, tokens: int) -> Tensor:
    """Return the loss of a micro-batch; `load` is that of `RouterLoad.total`."""
    choices, probabilities = load.sum(1) / (tokens * load.shape[1])
    loss: Tensor = load.shape[2] * (choices.detach() * probabilities).sum()
    return loss


def load_metrics(load: Tensor) -> dict[str, float]:
    """Return metrics of each layer from the load of an update's tokens [2, layers, E]."""
    layers, experts = load.shape[1:]
    tokens = load[1].sum(-1)  # probabilities of a token add up to 1
    balance = experts * (load[0] * load[1]).sum(-1) / tokens.square()
    violation = load[0].amax(-1) * experts / load[0].sum(-1) - 1
    utilization = (load[0] > 0).double().mean(-1)
    names = {"load_balance": balance, "max_violation": violation, "expert_utilization": utilization}
    return {f"moe/{name}/layer_{layer}": float(found[layer]) for name, found in names.items() for layer in range(layers)}
