"""Routing replay: a forward with the experts that were chosen before.

The choice is that of the rollout engine, or of the forward that computed the old log-probs.
The former is R3 (Ma et al. 2025, arXiv 2510.11370). The weights of forced experts are the router's own probabilities of them,
normalized as the model does, so gradients reach the router. A forced choice enters each decoder layer as an argument:
recomputed activations (gradient checkpointing) then read the choice of their own forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayrlhf.config.model import ModelSection
from rayrlhf.data.expert_ids import OWN_CHOICE
from rayrlhf.errors import UserError
from rayrlhf.library_types import PretrainedConfig
from rayrlhf.models.load import load_architecture

if TYPE_CHECKING:
    from rayrlhf.models.network import Network

ROUTERS = {"qwen3_moe": ("Qwen3MoeTopKRouter", "num_experts"), "mixtral": ("MixtralTopKRouter", "num_local_experts")}
"""Class of the routers, and the key of their number of experts, by family."""
ARGUMENT = "forced_experts"
"""Argument of the trunk and of its decoder layers."""


@dataclass(slots=True, eq=False)
class ForcedExperts:
    """Forced choice of one forward.

    Attributes:
        ids: int16 [tokens, layers, experts per token], `OWN_CHOICE` for the router's own.
        differs: bool [tokens], set where a router would have chosen another set of experts.
        records: own choices are written into `ids`.
    """

    ids: Tensor
    differs: Tensor
    records: bool = False

    @classmethod
    def of(cls, ids: Tensor, *, records: bool = False) -> "ForcedExperts":
        """Return the choice of a batch."""
        return cls(ids, torch.zeros(len(ids), dtype=torch.bool, device=ids.device), records)

    def part(self, start: int, length: int) -> "ForcedExperts":
        """Return the choice of some tokens; what differs there is set here too."""
        return ForcedExperts(self.ids[start : start + length], self.differs[start : start + length], self.records)

    def at_layer(self, layer: int, own: Tensor) -> Tensor:
        """Return the experts [tokens, K] of a layer, and note other own choices."""
        wanted = self.ids[:, layer].long()
        known = wanted[:, :1] != OWN_CHOICE
        self.differs |= known[:, 0] & (wanted.sort(-1).values != own.sort(-1).values).any(-1)
        experts = torch.where(known, wanted, own)
        if self.records:
            self.ids[:, layer] = experts.to(self.ids.dtype)
        return experts


def forced_experts(network: "Network", tokens: Tensor, ids: Tensor | None, *, record: bool) -> ForcedExperts | None:
    """Return the choice of a batch, or None for the routers' own.

    Args:
        network: with replay or without.
        tokens: [B, L].
        ids: to force, if the network replays any.
        record: force none, and record the routers' own.

    Raises:
        ValueError: the network cannot record them.
    """
    if not record:
        return ForcedExperts.of(ids) if network.replays_routing and ids is not None else None
    if not network.replays_routing:
        raise ValueError("experts requested from a network that replays no routing")
    shape = tokens.numel(), network.model.config.num_hidden_layers, network.model.config.num_experts_per_tok
    unknown = torch.full(shape, OWN_CHOICE, dtype=torch.int16, device=tokens.device)
    return ForcedExperts.of(unknown, records=True)


def parts(forced: ForcedExperts | None, lengths: Sequence[int], width: int) -> list[ForcedExperts | None]:
    """Return the choice of each sample of a batch.

    Args:
        forced: of the batch.
        lengths: tokens of each sample.
        width: tokens of a row; 0 for samples end to end.
    """
    starts = np.cumsum([0, *lengths[:-1]]) if not width else np.arange(len(lengths)) * width
    return [None if forced is None else forced.part(int(start), size) for start, size in zip(starts, lengths, strict=True)]


def differing(forced: ForcedExperts | None, predictors: Tensor) -> Tensor:
    """Return 1 at each predictor whose own choice differs from the forced one, float32."""
    if forced is None:
        return torch.zeros(len(predictors), device=predictors.device)
    return forced.differs.index_select(0, predictors).float()


def replay_routing(model: nn.Module, path: str) -> None:
    """Let the decoder layers of a model take `ForcedExperts` as their argument `ARGUMENT`.

    Raises:
        UserError: its routers are not known.
    """
    for layer, (name, router) in enumerate(_routers(model, path)):
        parents = [model.get_submodule(name.rsplit(".", depth)[0]) for depth in range(1, name.count(".") + 1)]
        block = next(parent for parent in parents if hasattr(parent, "self_attn"))
        block.register_forward_pre_hook(partial(_take, router), with_kwargs=True)
        router.register_forward_hook(partial(_force, layer))


def _take(router: Any, block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    named = dict(named)
    router.forced = named.pop(ARGUMENT, None)
    return arguments, named


def _force(layer: int, router: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Replace a router's output (logits, weights, experts) by that of the forced experts."""
    logits, weights, own = output
    if router.forced is None:
        return output
    experts = router.forced.at_layer(layer, own)
    chosen = torch.softmax(logits, dim=-1, dtype=torch.float).gather(1, experts)
    if getattr(router, "norm_topk_prob", True):
        chosen = chosen / chosen.sum(dim=-1, keepdim=True)
    return logits, chosen.to(weights.dtype), experts


class RoutingRecorder:
    """Records the experts that a model chooses in its last forward.

    Attributes:
        experts: of a layer.
    """

    def __init__(self, model: Any, path: str) -> None:
        self.experts = expert_count(model.config, path)
        self._ids: dict[int, Tensor] = {}
        for layer, (_, router) in enumerate(_routers(model, path)):
            router.register_forward_hook(partial(self._record, layer))

    def _record(self, layer: int, router: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self._ids[layer] = output[2]

    def ids(self, rows: int) -> NDArray[np.int64]:
        """Return the experts of a padded batch, [rows, tokens, layers, experts per token]."""
        every = torch.stack([self._ids[layer] for layer in sorted(self._ids)], 1).cpu().numpy()
        return every.reshape(rows, -1, *every.shape[1:])


def expert_count(config: PretrainedConfig, path: str) -> int:
    """Return the number of experts of a layer.

    Raises:
        UserError: the family's routers are not known.
    """
    if config.model_type not in ROUTERS:
        raise UserError(
            f"rollout.routing_replay: not for a {config.model_type} model ({path}); expected one of "
            f"{', '.join(ROUTERS)}, or 'off'"
        )
    return int(getattr(config, ROUTERS[config.model_type][1]))


def check_routing_replay(model: ModelSection) -> None:
    """Check, before weights load, that a model's routing can be replayed.

    Raises:
        UserError: it cannot.
    """
    expert_count(load_architecture(model), model.path)


def _routers(model: Any, path: str) -> list[tuple[str, nn.Module]]:
    expert_count(model.config, path)
    wanted = ROUTERS[model.config.model_type][0]
    return [(name, module) for name, module in model.named_modules() if type(module).__name__ == wanted]
