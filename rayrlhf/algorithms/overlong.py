"""What a response pays for nearing the length limit, before the limit cuts it off (DAPO, Yu et al. 2025, equation 13)."""

from torch import Tensor


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """0 up to `limit - buffer` tokens, then falling linearly to -1 at the limit and beyond: float32 [B].

    Args:
        lengths: int64 [B], tokens of each response.
        limit: the longest response, in tokens.
        buffer: tokens before the limit in which length costs, >= 1.
    """
    return -((lengths - (limit - buffer)).float() / buffer).clamp(0, 1)
