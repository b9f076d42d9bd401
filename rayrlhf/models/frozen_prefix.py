"""Cache of the frozen lower layers' outputs, computed once per sequence.

With adapters on the last n layers only, all layers below are the same function for the policy, for its reference and in every
epoch. Their output is one hidden state per token, which is small: it is stored on the first forward, and later forwards start
from it. Old log-probs, reference and one update then take one pass through the lower layers instead of three.
"""

import torch
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
    def supports(trunk: PreTrainedModel, first_layer: int) -> bool:
        """Return True if starting at layer `first_layer` reproduces this trunk bit for bit.

        It runs both and compares them.
        """
        kinds = getattr(trunk.config, "layer_types", None) or ["full_attention"]
        if first_layer < 1 or not isinstance(getattr(trunk, "layers", None), nn.ModuleList) or len(set(kinds)) > 1:
            return False
        probe = FrozenPrefix(trunk, first_layer)
        tokens = torch.arange(6, device=next(trunk.parameters()).device).view(2, 3) % trunk.config.vocab_size
        with torch.no_grad():
            whole = trunk(input_ids=tokens, use_cache=False).last_hidden_state
            return torch.equal(probe.run(tokens, [3, 3]), whole) and torch.equal(probe.run(tokens, [3, 3]), whole)

    def run(self, input_ids: Tensor, lengths: list[int]) -> Tensor:
        """Return the trunk's final hidden states [B, L, H] of right-padded int64 tokens [B, L].

        Hidden states of padding are undefined.
        """
        keys = [row[:length].numpy().tobytes() for row, length in zip(input_ids.cpu(), lengths, strict=True)]
        if all(key in self._known for key in keys):
            return self._from_first_layer(self._padded(keys, input_ids))
        kept: list[Tensor] = []
        handle = self._trunk.layers[self._first_layer].register_forward_pre_hook(
            lambda _, arguments, named: kept.append((arguments[0] if arguments else named["hidden_states"]).detach()),
            with_kwargs=True,
        )
        try:
            hidden: Tensor = self._trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        finally:
            handle.remove()
        for key, row, length in zip(keys, kept[0], lengths, strict=True):
            self._keep(key, row[:length])
        return hidden

    def clear(self) -> None:
        """Drop all sequences."""
        self._known.clear()
        self._bytes = 0

    def _keep(self, key: bytes, hidden: Tensor) -> None:
        size = hidden.numel() * hidden.element_size()
        if key not in self._known and self._bytes + size <= BUDGET_BYTES:
            self._known[key] = hidden.clone()
            self._bytes += size

    def _padded(self, keys: list[bytes], input_ids: Tensor) -> Tensor:
        first = self._known[keys[0]]
        hidden = first.new_zeros(*input_ids.shape, first.shape[-1])
        for row, key in enumerate(keys):
            known = self._known[key]
            hidden[row, : len(known)] = known
        return hidden

    def _from_first_layer(self, hidden: Tensor) -> Tensor:
        layers = self._trunk.layers
        self._trunk.layers = layers[self._first_layer :]
        try:
            result: Tensor = self._trunk(inputs_embeds=hidden, use_cache=False).last_hidden_state
        finally:
            self._trunk.layers = layers
        return result
