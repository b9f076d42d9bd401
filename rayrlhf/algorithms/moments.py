"""Mean and standard deviation of all scores of a run so far, and the shaping of scores by them."""

import torch
from torch import Tensor

SMALLEST_SPREAD = torch.finfo(torch.float32).eps
"""Added to the standard deviation (TRL 0.11.4), and the spread below which scores count as all equal."""


class RunningMoments:
    """Moments of a stream of batches by the parallel form of Welford's update (Chan et al. 1979; TRL 0.11.4).

    Attributes:
        count: scores seen; 1e-24 before the first, as in TRL, so that the update needs no special case.
        mean: their mean.
        variance: their population variance.
        std: their standard deviation, unbiased; 1 until there are two scores.
    """

    def __init__(self) -> None:
        self.count = 1e-24
        self.mean = 0.0
        self.variance = 1.0
        self.std = 1.0

    def update(self, scores: Tensor) -> None:
        """Take in a batch of scores, float [B].

        Raises:
            ValueError: the batch is empty, or a score is not finite: it would spoil every later mean.
        """
        if not scores.numel() or not scores.isfinite().all():
            raise ValueError(f"running moments need finite scores, got {scores.tolist()}")
        batch = scores.double()
        size = batch.numel()
        total = self.count + size
        delta = batch.mean().item() - self.mean
        squares = self.variance * self.count + batch.var(correction=0).item() * size + delta**2 * self.count * size / total
        self.mean += delta * size / total
        self.count = total
        self.variance = squares / total
        self.std = (squares / (total - 1)) ** 0.5 if total > 1 else 1.0

    def state_dict(self) -> dict[str, float]:
        """Return everything that a resumed run needs."""
        return {"count": self.count, "mean": self.mean, "variance": self.variance, "std": self.std}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take up a saved state."""
        self.count, self.mean = state["count"], state["mean"]
        self.variance, self.std = state["variance"], state["std"]


def shape_scores(
    scores: Tensor, moments: RunningMoments, *, scale: bool = False, center: bool = False, clip: float | None = None
) -> Tensor:
    """Centre, scale and clip the scores of one step, in this order.

    TRL 0.11.4 calls the three `use_score_norm`, `use_score_scaling` and `score_clip`, and centres only what it scales.
    `moments` takes the batch in first, and only when `scale` or `center` reads it: call once a step.

    Args:
        scores: float [B].
        moments: of the run so far.
        scale: divide by the running standard deviation. While all scores are equal it counts as 1 (TRL divides by 1e-7 then).
        center: subtract the running mean.
        clip: bound of the absolute value; None leaves it open.

    Returns:
        Float [B].

    Raises:
        ValueError: see `RunningMoments.update`.
    """
    if scale or center:
        moments.update(scores)
    shaped = scores - moments.mean if center else scores
    if scale and moments.std > SMALLEST_SPREAD:
        shaped = shaped / (moments.std + SMALLEST_SPREAD)
    return shaped if clip is None else shaped.clamp(-clip, clip)


def penalise_missing_stop(scores: Tensor, stopped: Tensor, penalty: float) -> Tensor:
    """Subtract `penalty` from the scores [B] of responses that did not stop by themselves (TRL 1.12.0 `missing_eos_penalty`).

    Args:
        scores: float [B].
        stopped: bool [B].
        penalty: in units of the score.
    """
    return torch.where(stopped, scores, scores - penalty)
