"""What a loss function returns: terms per token, never a mean.

The caller divides the sum by the token count of the whole optimizer step. A mean taken here would weight tokens by the
micro-batch they happen to share, so that splitting a batch would change the gradient.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """A loss before reduction.

    Attributes:
        loss: float [B, T] with gradient; 0, and without gradient, behind the mask.
        statistics: metric name -> float [B, T], detached, 0 behind the mask. The metric is the sum over the optimizer step's
            tokens divided by their number.
    """

    loss: Tensor
    statistics: dict[str, Tensor]

    def sums(self) -> dict[str, Tensor]:
        """Every statistic summed to a scalar: add these over micro-batches and ranks, then divide by the token count."""
        return {name: values.sum() for name, values in self.statistics.items()}
