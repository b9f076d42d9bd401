"""Cache of the frozen lower layers' outputs, computed once per sequence.

With adapters on the last n layers only, all layers below are the same function for the policy, for its reference and in every
epoch. Their output is one hidden state per token, which is small: it is stored on the first forward, and later forwards start
from it. Old log-probs, reference and one update then take one pass through the lower layers instead of three.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayrlhf.config.section import GIB
from rayrlhf.library_types import PreTrainedModel

BUDGET_BYTES = GIB
"""Maximum memory of cached hidden states; further sequences are computed in full every time."""


class FrozenPrefix:
    """Lower layers of a trunk, cached per sequence until `clear`."""

    def __init__(self, trunk: PreTrainedModel, first_layer: int) -> None:
        """Cache the input of layer `first_layer` (see `supports`)."""
        self._trunk = trunk
        self._first_layer = first_layer
        self._known: dict[bytes, Tensor] = {}
        self._bytes = 0

    @staticmethod
    def supports(trunk: PreTrainedModel, first_layer: int, **named: Any) -> bool:
        """Return True if starting at layer `first_layer` reproduces this trunk bit for bit.

        It runs both and compares them.

        Args:
            trunk: the trunk.
            first_layer: number of the first layer that is not cached.
            named: further arguments that every forward of the trunk needs.
        """
        kinds = getattr(trunk.config, "layer_types", None) or ["full_attention"]
        if first_layer < 1 or not isinstance(getattr(trunk, "layers", None), nn.ModuleList) or len(set(kinds)) > 1:
            return False
        probe = FrozenPrefix(trunk, first_layer)
        tokens = torch.arange(6, device=next(trunk.parameters()).device).view(2, 3) % trunk.config.vocab_size
        places = list(np.arange(6).reshape(2, 3))
        with torch.no_grad():
            whole = trunk(input_ids=tokens, use_cache=False, **named).last_hidden_state
            return all(torch.equal(probe.run(tokens, places, **named), whole) for _ in range(2))

    def run(self, input_ids: Tensor, places: Sequence[NDArray[np.int64]], **named: Any) -> Tensor:
        """Return the trunk's final hidden states [B, L, H] of int64 tokens [B, L].

        Hidden states outside of `places` are undefined.

        Args:
            input_ids: tokens in any layout.
            places: for each sequence the index of each of its tokens in the flattened batch, int64 [its length].
            named: further arguments of the trunk.
        """
        tokens = input_ids.flatten().cpu().numpy()
        keys = [tokens[own].tobytes() for own in places]
        if all(key in self._known for key in keys):
            return self._from_first_layer(self._start(keys, places, input_ids), named)
        kept: list[Tensor] = []
        handle = self._trunk.layers[self._first_layer].register_forward_pre_hook(
            lambda _, arguments, given: kept.append((arguments[0] if arguments else given["hidden_states"]).detach()),
            with_kwargs=True,
        )
        try:
            hidden: Tensor = self._trunk(input_ids=input_ids, use_cache=False, **named).last_hidden_state
        finally:
            handle.remove()
        states = kept[0].flatten(0, 1)
        for key, own in zip(keys, places, strict=True):
            self._keep(key, states, own)
        return hidden

    def clear(self) -> None:
        """Drop all sequences."""
        self._known.clear()
        self._bytes = 0

    def _keep(self, key: bytes, states: Tensor, own: NDArray[np.int64]) -> None:
        size = len(own) * states.shape[-1] * states.element_size()
        if key not in self._known and self._bytes + size <= BUDGET_BYTES:
            self._known[key] = states[torch.from_numpy(own)]
            self._bytes += size

    def _start(self, keys: list[bytes], places: Sequence[NDArray[np.int64]], input_ids: Tensor) -> Tensor:
        """Return the input [B, L, H] of the first layer that is not cached."""
        first = self._known[keys[0]]
        states = first.new_zeros(input_ids.numel(), first.shape[-1])
        for key, own in zip(keys, places, strict=True):
            states[torch.from_numpy(own)] = self._known[key]
        return states.view(*input_ids.shape, -1)

    def _from_first_layer(self, hidden: Tensor, named: Mapping[str, Any]) -> Tensor:
        layers = self._trunk.layers
        self._trunk.layers = layers[self._first_layer :]
        try:
            result: Tensor = self._trunk(inputs_embeds=hidden, use_cache=False, **named).last_hidden_state
        finally:
            self._trunk.layers = layers
        return result
