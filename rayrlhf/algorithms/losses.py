"""The policy losses by name. A new one is a file with such a function and a line here; the critic has a single loss."""

from typing import Literal, Protocol

from torch import Tensor

from rayrlhf.algorithms.cispo import bounded_weight_loss
from rayrlhf.algorithms.gspo import sequence_policy_loss
from rayrlhf.algorithms.loss_terms import LossTerms
from rayrlhf.algorithms.policy_loss import clipped_policy_loss
from rayrlhf.algorithms.value_loss import clipped_value_loss

__all__ = [
    "POLICY_LOSSES",
    "USUAL_NORMALISATION",
    "LossTerms",
    "Normalisation",
    "PolicyLoss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "normalised",
]

Normalisation = Literal["token", "sequence", "constant"]
"""What the sum over an optimizer step is divided by: its tokens; each response by its length, then by the number of responses;
or the number of responses times one length for all."""


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
    "gspo": sequence_policy_loss,
    "cispo": bounded_weight_loss,
}

USUAL_NORMALISATION: dict[str, Normalisation] = {"ppo": "token", "gspo": "sequence", "cispo": "token"}
"""The normalisation that each loss was published with (for ppo, that of DAPO and of both lines of TRL)."""


def normalised(loss: Tensor, mask: Tensor, normalisation: Normalisation, longest: int) -> Tensor:
    """Divide what must be divided row by row; the caller divides by the tokens or responses of the whole optimizer step.

    Args:
        loss: float [B, T], 0 behind the mask.
        mask: bool [B, T], the action mask.
        normalisation: `token` leaves the loss as it is; `sequence` divides by the row's length, so that each response counts
            the same (Shao et al. 2024); `constant` divides by `longest`, so that each token does, whatever the others' lengths
            (Liu et al. 2025).
        longest: the constant, in tokens.
    """
    if normalisation == "token":
        return loss
    return loss / (mask.sum(1, keepdim=True).clamp(min=1) if normalisation == "sequence" else longest)
