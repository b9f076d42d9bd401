"""Share of an update that survives rounding to the rollout engine's precision."""

from torch import Tensor


class UpdateShare:
    """Projection of the rounded update of all weights on the intended one.

    With intended updates u and arrived ones a it is sum(a u) / sum(u u): 1 if everything arrives, 0 if nothing does.
    """

    def __init__(self) -> None:
        self._product = self._norm = 0.0

    def add(self, start: Tensor, intended: Tensor, arrived: Tensor) -> None:
        """Add one weight in three tensors of one shape.

        Args:
            start: before training.
            intended: after training.
            arrived: as the engine gets it.
        """
        update = (intended - start).float()
        # The engine's own start is the rounded one.
        received = arrived.float() - start.to(arrived.dtype).float()
        self._product += float((received * update).sum())
        self._norm += float(update.square().sum())

    @property
    def value(self) -> float | None:
        """The share; None before the first update."""
        return self._product / self._norm if self._norm else None
