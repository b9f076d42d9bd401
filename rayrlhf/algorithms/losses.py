"""The policy losses by name. A new one is a file with such a function and a line here; the critic has a single loss."""

from typing import Protocol

from torch import Tensor

from rayrlhf.algorithms.loss_terms import LossTerms
from rayrlhf.algorithms.policy_loss import clipped_policy_loss
from rayrlhf.algorithms.value_loss import clipped_value_loss

__all__ = ["POLICY_LOSSES", "LossTerms", "PolicyLoss", "clipped_policy_loss", "clipped_value_loss"]


class PolicyLoss(Protocol):
    """The call that every policy loss answers; tensors are [B, T], see `clipped_policy_loss`."""

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        *,
        clip_low: float,
        clip_high: float,
        dual_clip: float | None,
    ) -> LossTerms:
        """Per-token loss and statistics."""
        ...


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo": clipped_policy_loss,
}
