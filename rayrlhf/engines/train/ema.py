"""Exponential moving average of the trained weights, smoother than the weights of one step.

average(t) = decay x average(t - 1) + (1 - decay) x weights(t), with average(0) = weights(0). Only rank 0 keeps it, in float32.
It needs whole parameters, so it is not available if the backend shards them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """Average of a network's trainable parameters."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Begin at the current weights.

        Args:
            network: network whose whole parameters this process holds.
            decay: share of the average that a step keeps, in [0, 1).
        """
        self._decay = decay
        self._parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        self._averages = {name: parameter.detach().float().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Update the average with the current weights; call after each optimizer step."""
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name].detach().float(), 1 - self._decay)

    def state(self) -> dict[str, Tensor]:
        """Return the averages by parameter name; the tensors are valid until the next step."""
        return self._averages

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the averages of `state`.

        Raises:
            ValueError: it has other parameters.
        """
        if set(state) != set(self._averages):
            raise ValueError(f"an average of {len(state)} parameters, expected those of the {len(self._averages)} trained ones")
        for name, average in self._averages.items():
            average.copy_(state[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the network's weights by the averages inside the block.

        Its own weights are restored bit for bit.
        """
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
