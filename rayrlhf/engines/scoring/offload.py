"""Weights that wait in main memory between the turns of a model that is only read.

A reference or reward model works for a few seconds of a step and holds its share of a GPU all the time. Offloaded, its weights
stay in page-locked main memory, are copied to the device when its turn begins, and the copies are dropped when it ends: nothing
is ever copied back, because nothing changes them. On a CPU both memories are one, and nothing is moved.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Offload:
    """Gives a frozen network copies of its weights for as long as they are needed."""

    def __init__(self, network: nn.Module, fetch: Callable[[Tensor], Tensor] | None) -> None:
        """Take a network whose weights lie where they are to wait.

        Args:
            network: frozen. Tied weights are one parameter and stay tied.
            fetch: makes the copy that a turn works with; None where the weights stay where they are.
        """
        tensors = [] if fetch is None else [*network.parameters(), *network.buffers()]
        self._fetch = fetch or (lambda tensor: tensor)
        self._waiting = [(tensor, tensor.data) for tensor in tensors]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For its duration the network works with the copies; they are dropped also when it fails."""
        try:
            for tensor, waiting in self._waiting:
                tensor.data = self._fetch(waiting)
            yield
        finally:
            for tensor, waiting in self._waiting:
                tensor.data = waiting


def move_to_device(network: nn.Module, device: torch.device, *, offload: bool) -> Offload:
    """Move a frozen network to its device, or leave it in page-locked main memory until its turn comes.

    Args:
        network: on the CPU.
        device: where it works.
        offload: whether its weights wait in main memory between turns; without effect where the device is the CPU.
    """
    if not offload or device.type == "cpu":
        network.to(device)
        return Offload(network, None)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.pin_memory()
    return Offload(network, lambda tensor: tensor.to(device, non_blocking=True))
