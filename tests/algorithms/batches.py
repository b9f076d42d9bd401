"""Random right-padded batches for property tests: hypothesis picks the shape and a seed, torch the numbers."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Response-aligned tensors [B, T]; every row of the mask has an action. `padded` has NaN wherever the mask is False."""

    mask: Tensor
    generator: torch.Generator

    def floats(self, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(self.mask.shape, generator=self.generator, dtype=torch.float64)

    def logprobs(self) -> Tensor:
        return -self.floats().abs()

    def scores(self) -> Tensor:
        return torch.randn(len(self.mask), generator=self.generator, dtype=torch.float64)

    def behind_nan(self, values: Tensor) -> Tensor:
        """The same values with NaN behind the mask."""
        return values.masked_fill(~self.mask, torch.nan)


@st.composite
def batches(draw: st.DrawFn, *, holes: bool = True, rows: int = 5, columns: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    height, width = draw(st.integers(1, rows)), draw(st.integers(1, columns))
    lengths = torch.randint(1, width + 1, (height,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    if holes and draw(st.booleans()):
        mask &= torch.rand(mask.shape, generator=generator) < 0.6
        mask[torch.arange(height), lengths - 1] = True
    return Batch(mask, generator)


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Exact KL(p || p_ref) in nats over the vocabulary, in float32 (TRL 0.11.4 `full`).

    Args:
        logits: [..., V] of the policy, already divided by the temperature. Call on chunks of positions to bound memory.
        ref_logits: [..., V] of the reference, likewise.

    Returns:
        Float32 [...]. Tokens that the policy excludes (logit -inf) add 0; a token that only the reference excludes makes it
        inf.
    """
    log_p = logits.float().log_softmax(-1)
    log_ratio = torch.where(log_p.isneginf(), 0.0, log_p - ref_logits.float().log_softmax(-1))
    return (log_p.exp() * log_ratio).sum(-1)
