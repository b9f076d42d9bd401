"""Pairs of the responses to a prompt, ranked by their scores.

Online DPO (Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback"; TRL 1.16 `OnlineDPOTrainer`) samples
two responses, and learns from the better and the worse one by a loss of pairs. With more samples the best is paired with the
worst, the second best with the second worst, and so on. Equal scores make no pair.
"""

import torch
from torch import Tensor


def ranked_pairs(scores: Tensor, groups: Tensor) -> list[tuple[int, int]]:
    """Return pairs of rows, the one with the higher score first.

    Args:
        scores: float [B]; a row with NaN is in no pair.
        groups: int64 [B], prompt of each row.
    """
    pairs = []
    for group in torch.unique(groups).tolist():
        rows = [row for row in (groups == group).nonzero().flatten().tolist() if not scores[row].isnan()]
        ranked = sorted(rows, key=lambda row: -float(scores[row]))
        halves = zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False)
        pairs += [(better, worse) for better, worse in halves if scores[better] > scores[worse]]
    return pairs
