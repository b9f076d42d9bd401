"""The KL coefficient over the run: fixed, or steered so that the KL of a sequence settles at a target."""

from typing import Protocol

MAX_ERROR = 0.2
"""The relative error is clipped to +-this, so that one wild step moves the coefficient by a bounded factor."""


class KLController(Protocol):
    """Holds the coefficient of the step that is running."""

    value: float

    def update(self, kl: float, samples: int) -> None:
        """Learn the mean KL per sequence (nats) of a step of `samples` sequences; the next step sees the new value."""
        ...

    def state_dict(self) -> dict[str, float]:
        """Return everything that a resumed run needs."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up a saved state."""
        ...


class FixedKLController:
    """A coefficient that never changes."""

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, kl: float, samples: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, float]:
        """Return the coefficient."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up a saved coefficient."""
        self.value = state["value"]


class AdaptiveKLController(FixedKLController):
    """Proportional control in log space (Ziegler et al. 2019, section 2.2; TRL 0.11.4).

    beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * samples / horizon).
    """

    def __init__(self, value: float, target: float, horizon: int) -> None:
        super().__init__(value)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, samples: int) -> None:
        """Raise the coefficient when `kl` (nats per sequence) is above the target, lower it when below."""
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        self.value *= 1 + error * samples / self.horizon


def kl_controller(coefficient: float, target: float | None, horizon: int) -> KLController:
    """Make the controller of a config: adaptive when `target` (nats per sequence) is given; `horizon` counts samples."""
    return FixedKLController(coefficient) if target is None else AdaptiveKLController(coefficient, target, horizon)
