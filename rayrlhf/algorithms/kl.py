"""KL of the policy from the reference, per token, and its coefficient over a run.

The estimators k1, k2, k3 (Schulman, "Approximating KL divergence", 2020) read only the log-ratio d = log p - log p_ref of the
token that was sampled from p. k1 and k3 are unbiased, k2 is biased but has the right gradient.

The coefficient is fixed, or adapted so that the KL per sequence reaches a target.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Protocol

import torch
from torch import Tensor

from rayrlhf.algorithms.masking import zero_masked
from rayrlhf.plugins import Registry

MAX_K3 = 10.0
"""Bound on k3 in nats per token (as OpenRLHF and NeMo-RL). It grows as e^-d: one token at d = -51 overflows a variance."""

KLEstimator = Callable[Concatenate[Tensor, ...], Tensor]
"""`estimator(log_ratio, **arguments)`: from d = log p - log p_ref, float [B, T], to nats of the same shape."""


def k1(log_ratio: Tensor) -> Tensor:
    """Return d itself: unbiased, of either sign."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Return d^2 / 2: biased, with the gradient of the full KL."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """Return e^-d - 1 + d, at most `MAX_K3`: unbiased below that, and never negative."""
    return (torch.expm1(-log_ratio) + log_ratio).clamp(max=MAX_K3)


KL_ESTIMATORS: dict[str, KLEstimator] = {"k1": k1, "abs": torch.abs, "k2": k2, "k3": k3}
"""Built-in estimators. TRL 0.11.4 calls k1 `kl` and k2 `mse`."""

KL_REGISTRY: Registry[KLEstimator] = Registry("KL estimator", KL_ESTIMATORS)
"""Resolves `algorithm.kl.estimator`."""

NO_ARGUMENTS: Mapping[str, Any] = {}


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> Tensor:
    """Per-token KL estimate in nats.

    Args:
        logprobs: float [B, T], of the sampled tokens under the policy.
        ref_logprobs: float [B, T], of the same tokens under the reference.
        estimator: a key of `KL_ESTIMATORS`, `module:function` or `path/to/file.py:function`.
        arguments: keyword arguments of the estimator.

    Returns:
        Float [B, T]. The built-in estimators are elementwise, so NaN at masked positions stays there.

    Raises:
        UserError: unknown estimator. TRL's `full` is one, because it needs the logits.
    """
    return KL_REGISTRY.resolve(estimator)(logprobs - ref_logprobs, **arguments)


def kl_loss(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str, arguments: Mapping[str, Any] = NO_ARGUMENTS
) -> Tensor:
    """Per-token KL as a loss: the value of `estimator`, the gradient of k2.

    For tokens sampled from the policy, d * grad(log p), the gradient of k2, is the unbiased gradient of KL(p || p_ref). That of
    k1 is 0 in expectation and that of k3 belongs to KL(p_ref || p) (Tang and Munos, "On a few pitfalls in KL divergence
    gradient estimation for RL", 2025), so these two only report the value. For tokens of an older policy multiply by the
    detached ratio.

    Args:
        logprobs: float [B, T], with gradient.
        ref_logprobs: float [B, T].
        mask: bool [B, T]; value and gradient are 0 where it is False.
        estimator: see `kl_penalty`.
        arguments: keyword arguments of the estimator.

    Returns:
        Float [B, T], nats.

    Raises:
        UserError: unknown estimator.
    """
    log_ratio = zero_masked(logprobs - ref_logprobs, mask)
    surrogate = k2(log_ratio)
    value = zero_masked(KL_REGISTRY.resolve(estimator)(log_ratio.detach(), **arguments), mask)
    return value + (surrogate - surrogate.detach())


MAX_ERROR = 0.2
"""Bound on the relative error, so that one outlier step changes the coefficient by a bounded factor."""


class KLController(Protocol):
    """KL coefficient of the current step."""

    value: float

    def update(self, kl: float, samples: int) -> None:
        """Adapt the coefficient to a step's mean KL per sequence (nats) over `samples` sequences."""
        ...

    def state_dict(self) -> dict[str, float]:
        """Return the state that a resumed run needs."""
        ...

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a saved state."""
        ...


class FixedKLController:
    """Constant coefficient."""

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, kl: float, samples: int) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, float]:
        """Return the coefficient."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore a saved coefficient."""
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
        """Raise the coefficient if `kl` (nats per sequence) exceeds the target, else lower it."""
        if not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        self.value *= 1 + error * min(samples / self.horizon, 1.0)


def kl_controller(coefficient: float, target: float | None, horizon: int) -> KLController:
    """Return an adaptive controller where `target` (nats per sequence) is set, else a fixed one.

    `horizon` is the time constant in samples.
    """
    return FixedKLController(coefficient) if target is None else AdaptiveKLController(coefficient, target, horizon)
