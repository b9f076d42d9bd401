"""How a reward model learns from pairs: the Bradley-Terry likelihood of the better answer winning, and a pull towards zero.

Bradley and Terry (1952) give the chance that one of two wins as the logistic function of the difference of their strengths.
As a loss with a margin it is that of Llama 2 (Touvron et al. 2023, section 3.2.2); the centering term, without which only
differences of rewards have a meaning, is that of Eisenstein et al. (2023). Both are TRL 1.16 `RewardTrainer`'s.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayrlhf.algorithms.loss_terms import LossTerms


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """-log sigmoid(chosen - rejected - margin), per pair.

    Args:
        chosen: float [B], reward of the better answer.
        rejected: float [B], reward of the worse one.
        margin: float [B], by how much the better one should win; 0 when not given.

    Returns:
        Float [B], nats; finite for any finite rewards.
    """
    difference = chosen - rejected
    return -logsigmoid(difference if margin is None else difference - margin)


def centering_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(chosen + rejected)^2, per pair: float [B] each, before any coefficient (TRL `center_rewards_coefficient`)."""
    return (chosen + rejected).square()


def preference_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, *, center_coefficient: float = 0.0
) -> LossTerms:
    """Bradley-Terry loss plus `center_coefficient` times the centering term.

    Args:
        chosen: float [B], with gradient.
        rejected: float [B], with gradient.
        margin: float [B]; 0 when not given.
        center_coefficient: weight of the centering term; TRL suggests 0.01.

    Returns:
        Terms per pair, [B]: a mean over them is a mean over pairs. Statistics under TRL's names: `accuracy` (1 where the better
        answer has the higher reward; equal rewards count as wrong), `margin` (chosen - rejected) and `mean_reward`; and beside
        them `loss/bradley_terry`, and `loss/centering` before its coefficient.
    """
    likelihood = bradley_terry_loss(chosen, rejected, margin)
    centering = centering_loss(chosen, rejected)
    loss = likelihood + center_coefficient * centering if center_coefficient else likelihood
    statistics = {
        "loss/bradley_terry": likelihood,
        "loss/centering": centering,
        "accuracy": (chosen > rejected).to(likelihood.dtype),
        "margin": chosen - rejected,
        "mean_reward": torch.stack([chosen, rejected]).mean(0),
    }
    return LossTerms(loss, {name: tensor.detach() for name, tensor in statistics.items()})
