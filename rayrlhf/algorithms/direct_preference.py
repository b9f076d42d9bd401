"""Learning a policy from pairs without a reward model: the log-ratio to a reference is the reward, pairs are classified by it.

`sigmoid` is DPO (Rafailov et al. 2023, eq. 7); with label smoothing it is conservative DPO (Mitchell 2023: a share of the
labels is taken to be wrong), and `robust` is its unbiased form (Chowdhury et al. 2024, eq. 11). `ipo` is the squared loss of
Azar et al. (2024, eq. 17) on means per token. All are TRL 1.16 `DPOTrainer`'s.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rayrlhf.algorithms.loss_terms import LossTerms

DirectLoss = Literal["sigmoid", "robust", "ipo"]


def direct_preference_loss(
    log_ratios: Tensor, lengths: Tensor, *, loss: DirectLoss = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0
) -> LossTerms:
    """Return the loss of pairs from what policy and reference say about both answers.

    Args:
        log_ratios: float [B, 2], log policy - log reference, summed over an answer's tokens; the better one first.
        lengths: [B, 2], tokens of the answers; `ipo` alone reads them.
        loss: see the module.
        beta: strength of the pull towards the reference; tau of `ipo`.
        label_smoothing: share of the labels that are taken to be wrong, in [0, 0.5); of no effect on `ipo`.

    Returns:
        Terms per pair, [B]. Statistics: `loss/direct_preference`, `accuracy` (1 where the better answer has the higher reward),
        `margin` (of the rewards), `reward_chosen` and `reward_rejected`, where a reward is beta times the log-ratio.
    """
    if loss == "ipo":
        per_token = log_ratios / lengths.clamp(min=1)
        losses = (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)).square()
    else:
        logits = beta * (log_ratios[:, 0] - log_ratios[:, 1])
        right, wrong = -logsigmoid(logits), -logsigmoid(-logits)
        if loss == "robust":
            losses = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
        else:
            losses = (1 - label_smoothing) * right + label_smoothing * wrong
    rewards = beta * log_ratios.detach()
    chosen, rejected = rewards.unbind(1)
    statistics = {
        "loss/direct_preference": losses.detach(),
        "accuracy": (chosen > rejected).to(torch.float32),
        "margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }
    return LossTerms(losses, statistics)
