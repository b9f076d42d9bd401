"""The clipped squared error of the critic (OpenAI Baselines' PPO2; TRL 0.11.4 and 1.12.0), per token."""

import torch
from torch import Tensor

from rayrlhf.algorithms.loss_terms import LossTerms
from rayrlhf.algorithms.masking import zero_masked


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> LossTerms:
    """1/2 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2).

    Args:
        values: float [B, T], with gradient.
        old_values: float [B, T], at the time of the rollout.
        returns: float [B, T].
        mask: bool [B, T], the value mask.
        clip: c, how far a value may move before its gradient stops; None takes the plain squared error.

    Returns:
        Terms, before any coefficient, with the statistics `loss/value_avg`, `val/clipfrac_avg` (1 where the clipped branch is
        the larger), `ppo/val/error` (the squared error without the half) and `ppo/val/vpred` (V).
    """
    values, old_values, returns = (zero_masked(tensor, mask) for tensor in (values, old_values, returns))
    free = (values - returns).square()
    # The value is clipped and not its difference: V_old + (V - V_old) would not give V back to the last bit.
    clipped = free if clip is None else (values.clamp(old_values - clip, old_values + clip) - returns).square()
    loss = 0.5 * torch.maximum(free, clipped)
    statistics = {
        "loss/value_avg": loss,
        "val/clipfrac_avg": (clipped > free).to(loss.dtype),
        "ppo/val/error": free,
        "ppo/val/vpred": values,
    }
    return LossTerms(loss, {name: tensor.detach() for name, tensor in statistics.items()})
