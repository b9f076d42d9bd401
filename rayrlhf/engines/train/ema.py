"""An exponential moving average of the weights that are trained: smoother than any one step's, and often better.

average(t) = decay x average(t - 1) + (1 - decay) x weights(t), from average(0) = weights(0). It is kept in float32 by the first
rank alone, which holds whole parameters at ZeRO-0, 1 and 2.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """The average of a network's trainable parameters; everything else is what the network has."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Begin at the present weights.

        Args:
            network: whose whole parameters this process holds.
            decay: share of the average that a step keeps, in [0, 1).
        """
        self._decay = decay
        self._parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        self._averages = {name: parameter.detach().float().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Take the present weights in; call after each optimizer step."""
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name].detach().float(), 1 - self._decay)

    def state(self) -> dict[str, Tensor]:
        """Return the averages by parameter name; the tensors are on loan until the next step."""
        return self._averages

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`.

        Raises:
            ValueError: it is of other parameters.
        """
        if set(state) != set(self._averages):
            raise ValueError(f"an average of {len(state)} parameters, expected those of the {len(self._averages)} trained ones")
        for name, average in self._averages.items():
            average.copy_(state[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the network have the averages inside the block; its own weights come back bit for bit."""
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
