"""Train backend protocol: a network wrapped for distributed training.

All code above this package uses only this protocol. To add a backend, write one class with these members and name it in
`TRAIN_BACKENDS` of `rayrlhf.engines.train.engine`; `tests/engines/train/backends/test_base.py` does so with plain torch.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayrlhf.config.train import TrainSection
from rayrlhf.models.direct_load import WeightShards
from rayrlhf.models.network import Network
from rayrlhf.models.network_io import NetworkOutput

StateFiles = dict[str, NDArray[np.uint8]]
"""One rank's part of the training state: path relative to the state's folder -> content as bytes [size]."""


class TrainBackend(Protocol):
    """Distribution of one network over the ranks of a process group.

    All ranks make the same calls in the same order.

    Attributes:
        shards_parameters: no rank holds whole parameters outside `gathered`.
        all_ranks_must_forward: every rank must run the same number of forward passes (collectives inside them).
    """

    shards_parameters: bool
    all_ranks_must_forward: bool

    @classmethod
    def weight_shards(cls, train: TrainSection, dtype: torch.dtype, device: torch.device) -> WeightShards | None:
        """Return the division of weights while the network loads.

        `wrap` takes it over. None loads whole weights.
        """
        ...

    @classmethod
    def wrap(cls, network: Network, optimizer: torch.optim.Optimizer, train: TrainSection, dtype: torch.dtype) -> Self:
        """Wrap a network; the process has joined its process group.

        Args:
            network: trained weights in float32, on its device; see `Network.weight_split` where ranks hold parts of them.
            optimizer: over the network's trainable parameters.
            train: sharding, offloading and clipping.
            dtype: compute dtype; any but float32 runs under autocast with float32 master weights.
        """
        ...

    def forward(self, *inputs: Any) -> NetworkOutput:
        """Call the network; see `Network.forward` for arguments."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of a scalar loss.

        The gradient of a step is the sum over micro-batches and ranks.

        Args:
            loss: of one micro-batch on this rank.
            last: the optimizer step follows.
        """
        ...

    def step(self, learning_rate: float, max_norm: float | None) -> float:
        """Clip the gradient, step the optimizer, discard the gradient. Call after `backward(..., last=True)`.

        A gradient with inf or NaN is discarded on all ranks, and no weight changes.

        Args:
            learning_rate: of this step.
            max_norm: clip the norm of the whole gradient to this; None clips nothing.

        Returns:
            Norm of the whole gradient before clipping; NaN if the step was discarded.
        """
        ...

    def discard(self) -> float:
        """Finish a step without changing any weight, in place of `step`; returns NaN."""
        ...

    def zero_grad(self) -> None:
        """Set the accumulated gradient to zero, between `backward(..., last=True)` and `step`."""
        ...

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Make parameters whole on every rank inside the block, for reading; every rank takes part."""
        ...

    def capture_state(self, counters: Mapping[str, int]) -> StateFiles:
        """Copy this rank's trained weights, optimizer state and `counters`; every rank takes part."""
        ...

    def load_state(self, folder: Path) -> Mapping[str, int]:
        """Restore this rank's part from the files of all ranks; returns the counters.

        Raises:
            UserError: the folder holds no training state for this rank.
        """
        ...

    def load_resized_state(self, folder: Path) -> Mapping[str, int]:
        """Restore a state saved on any number of ranks; returns the counters.

        Raises:
            UserError: the folder holds no complete state, or that of another model or sharding.
        """
        ...


def serialized(value: object) -> NDArray[np.uint8]:
    """Return the bytes [size] that `torch.save` writes."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return np.frombuffer(stream.getbuffer(), dtype=np.uint8)
