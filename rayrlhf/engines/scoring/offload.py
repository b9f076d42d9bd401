"""Offloading of frozen models to main memory while they are idle.

A reference or reward model computes for a few seconds of a step but would occupy GPU memory all the time. Offloaded weights
stay in page-locked main memory. They are copied to the device for each use, and the copies are dropped afterwards: nothing is
copied back, because nothing changes them. The freed blocks return to the device, where other processes may need them: PyTorch's
allocator would keep them for this process. On a CPU nothing is moved.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Offload:
    """Copies a frozen network's weights to its device while they are needed."""

    def __init__(self, network: nn.Module, fetch: Callable[[Tensor], Tensor] | None) -> None:
        """Wrap a network whose weights are in their idle location.

        Args:
            network: frozen. Tied weights are one parameter and stay tied.
            fetch: returns the working copy of a tensor; None if weights are not moved.
        """
        tensors = [] if fetch is None else [*network.parameters(), *network.buffers()]
        self._fetch = fetch or (lambda tensor: tensor)
        self._waiting = [(tensor, tensor.data) for tensor in tensors]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Use the copies inside the block; they are dropped also on errors."""
        try:
            for tensor, waiting in self._waiting:
                tensor.data = self._fetch(waiting)
            yield
        finally:
            for tensor, waiting in self._waiting:
                tensor.data = waiting
            if self._waiting:
                torch.cuda.empty_cache()


def move_to_device(network: nn.Module, device: torch.device, *, offload: bool) -> Offload:
    """Move a frozen network to its device, or prepare to offload it.

    Args:
        network: on the CPU.
        device: device to compute on.
        offload: keep its weights in main memory while idle; no effect if the device is the CPU.
    """
    if not offload or device.type == "cpu":
        network.to(device)
        return Offload(network, None)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data = tensor.data.pin_memory()
    return Offload(network, lambda tensor: tensor.to(device, non_blocking=True))
