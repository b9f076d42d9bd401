"""How far the policy is from the reference, per token.

The estimators k1, k2, k3 (Schulman, "Approximating KL divergence", 2020) read only the log-prob d = log p - log p_ref of the
token that was sampled from p; `full_kl` sums over the vocabulary. k1 and k3 are unbiased, k2 is biased but has the right
gradient.

The KL coefficient over the run: fixed, or steered so that the KL of a sequence settles at a target.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from rayrlhf.algorithms.masking import zero_masked

MAX_K3 = 10.0
"""Bound on k3 in nats per token (as OpenRLHF and NeMo-RL). It grows as e^-d: one token at d = -51 overflows a variance."""
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: log_ratio,
    "abs": torch.abs,
    "k2": lambda log_ratio: 0.5 * log_ratio.square(),
    "k3": lambda log_ratio: (torch.expm1(-log_ratio) + log_ratio).clamp(max=MAX_K3),
}
"""From d = log p - log p_ref to nats. TRL 0.11.4 calls k1 `kl` and k2 `mse`."""


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token KL estimate in nats.

    Args:
        logprobs: float [B, T], of the sampled tokens under the policy.
        ref_logprobs: float [B, T], of the same tokens under the reference.
        estimator: a key of `KL_ESTIMATORS`.

    Returns:
        Float [B, T]. Each place depends on its own inputs only, so NaN behind a mask stays there.

    Raises:
        ValueError: unknown estimator; `full` is one, since it needs the logits (`full_kl`).
    """
    return _estimator(estimator)(logprobs - ref_logprobs)


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str) -> Tensor:
    """Per-token KL as a loss: the value of `estimator`, the gradient of k2.

    For tokens drawn from the policy, d * grad(log p), the gradient of k2, is the unbiased gradient of KL(p || p_ref). That of
    k1 is 0 in expectation and that of k3 belongs to KL(p_ref || p) (Tang and Munos, "On a few pitfalls in KL divergence
    gradient estimation for RL", 2025), so they serve to report the value. For tokens of an older policy multiply by the
    detached ratio.

    Args:
        logprobs: float [B, T], with gradient.
        ref_logprobs: float [B, T].
        mask: bool [B, T]; value and gradient are 0 where it is False.
        estimator: a key of `KL_ESTIMATORS`.

    Returns:
        Float [B, T], nats.

    Raises:
        ValueError: unknown estimator.
    """
    log_ratio = zero_masked(logprobs - ref_logprobs, mask)
    surrogate = KL_ESTIMATORS["k2"](log_ratio)
    return _estimator(estimator)(log_ratio).detach() + (surrogate - surrogate.detach())


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Exact KL(p || p_ref) in nats over the vocabulary, in float32 (TRL 0.11.4 `full`).

    Args:
        logits: [..., V] of the policy, already divided by the temperature. Call on chunks of positions to bound memory.
        ref_logits: [..., V] of the reference, likewise.

    Returns:
        Float32 [...]. Tokens the policy excludes (logit -inf) add 0; one that only the reference excludes makes it inf.
    """
    log_p = logits.float().log_softmax(-1)
    log_ratio = torch.where(log_p.isneginf(), 0.0, log_p - ref_logits.float().log_softmax(-1))
    return (log_p.exp() * log_ratio).sum(-1)


def _estimator(name: str) -> Callable[[Tensor], Tensor]:
    if name not in KL_ESTIMATORS:
        raise ValueError(f"KL estimator {name!r} is not one of {', '.join(KL_ESTIMATORS)}")
    return KL_ESTIMATORS[name]


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

    beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * min(samples / horizon, 1)).
    TRL does not bound samples / horizon, so its coefficient turns negative above 5.
    """

    def __init__(self, value: float, target: float, horizon: int) -> None:
        super().__init__(value)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, samples: int) -> None:
        """Raise the coefficient when `kl` (nats per sequence) is above the target, lower it when below."""
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        self.value *= 1 + error * min(samples / self.horizon, 1.0)


def kl_controller(coefficient: float, target: float | None, horizon: int) -> KLController:
    """Make the controller of a config: adaptive when `target` (nats per sequence) is given; `horizon` counts samples."""
    return FixedKLController(coefficient) if target is None else AdaptiveKLController(coefficient, target, horizon)
