"""Nash-MD and XPO: online preference learning against an opponent other than the policy.

Nash-MD (Munos et al. 2024, "Nash Learning from Human Feedback") compares the policy with the geometric mixture of policy and
reference, p(a) ~ policy(a)^(1 - share) reference(a)^share at each token, and follows the gradient of the probability that the
policy is preferred, under a KL penalty. XPO (Xie et al. 2024, "Exploratory Preference Optimization") compares it with the
reference by the loss of DPO, and lowers the likelihood of the reference's responses, which makes the policy explore. Both
formulas are those of TRL 0.24 (`NashMDTrainer`, `XPOTrainer`), which later versions left out.
"""

import torch
from torch import Tensor

from rayrlhf.algorithms.losses import TokenLoss
from rayrlhf.algorithms.masking import zero_masked


def mixture_logits(policy: Tensor, reference: Tensor, share: Tensor) -> Tensor:
    """Return logits of the geometric mixture, float [B, V].

    Args:
        policy: float [B, V], logits.
        reference: float [B, V], logits.
        share: float [B], of the reference: 0 is the policy, 1 the reference.
    """
    weight = share[:, None]
    mixed = (1 - weight) * policy.log_softmax(-1) + weight * reference.log_softmax(-1)
    return torch.where(weight == 0, policy, torch.where(weight == 1, reference, mixed))


def opponent_pairs(scores: Tensor, groups: Tensor, samples: Tensor) -> list[tuple[int, int]]:
    """Return pairs of rows, the policy's sample first and its opponent's second.

    Sample 2i of a prompt is the policy's and 2i + 1 that of its opponent. Pairs with a missing row or a score of NaN are left
    out.

    Args:
        scores: float [B].
        groups: int64 [B], prompt of each row.
        samples: int64 [B], sample number of each row.
    """
    keys = list(zip(groups.tolist(), samples.tolist(), strict=True))
    rows = {key: row for row, key in enumerate(keys) if not scores[row].isnan()}
    pairs = ((row, rows.get((group, sample + 1))) for (group, sample), row in rows.items() if sample % 2 == 0)
    return [(own, other) for own, other in pairs if other is not None]


def nash_md_loss(logprobs: Tensor, reference: Tensor, preference: Tensor, mask: Tensor, *, beta: float = 0.1) -> TokenLoss:
    """Return beta sum_t sg(lp_t - ref_t) lp_t - (p - 1/2) sum_t lp_t, per response.

    Its gradient is that of the KL penalty and of the probability to be preferred, by REINFORCE with 1/2 as the baseline.

    Args:
        logprobs: float [B, T], with gradient, of the policy's responses.
        reference: float [B, T], log-probs of the reference.
        preference: float [B], probability p that the response is preferred to its opponent's.
        mask: bool [B, T], tokens of the responses.
        beta: strength of the KL penalty.

    Returns:
        The loss per response, [B]. Statistics: `loss/nash_md`, `nash/preference` and `nash/kl`.
    """
    known = zero_masked(logprobs, mask)
    log_ratios = (known - zero_masked(reference, mask)).detach()
    loss = beta * (log_ratios * known).sum(1) - (preference - 0.5) * known.sum(1)
    statistics = {"loss/nash_md": loss.detach(), "nash/preference": preference, "nash/kl": log_ratios.sum(1)}
    return TokenLoss(loss, statistics)
