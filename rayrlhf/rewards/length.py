"""A soft limit on length: free up to a limit, then a penalty that grows linearly to -1.

The formula is the soft overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13), whose cache is
`hard_limit - soft_limit` here.
"""

from typing import Literal

from rayrlhf.data.records import Rollout
from rayrlhf.errors import UserError


def length_penalty(
    responses: list[str],
    soft_limit: int,
    hard_limit: int,
    unit: Literal["tokens", "characters"] = "tokens",
    rollouts: list[Rollout] | None = None,
) -> list[float]:
    """Return 0 up to the soft limit, -1 from the hard limit on, and linear values in between.

    Args:
        responses: [B].
        soft_limit: longest length without a penalty.
        hard_limit: length at which the penalty is full.
        unit: what to count; tokens are response tokens, a sampled stop token included.
        rollouts: [B], needed to count tokens.

    Raises:
        UserError: the limits are not 0 <= soft < hard, the unit is unknown, or tokens cannot be counted.
    """
    if not 0 <= soft_limit < hard_limit:
        raise UserError(f"reward function 'length': expected 0 <= soft_limit < hard_limit, got {soft_limit} and {hard_limit}")
    if unit not in ("tokens", "characters"):
        raise UserError(f"reward function 'length': unit {unit!r}: expected 'tokens' or 'characters'")
    if unit == "characters":
        lengths = [len(response) for response in responses]
    elif rollouts is None:
        raise UserError("reward function 'length': unit 'tokens' needs rollouts; for plain text set unit to 'characters'")
    else:
        lengths = [len(rollout.response_ids) for rollout in rollouts]
    return [-min(1.0, max(0.0, (length - soft_limit) / (hard_limit - soft_limit))) for length in lengths]
