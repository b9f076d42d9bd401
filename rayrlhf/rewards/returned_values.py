"""Checks of the values that reward functions return, and their placement on tokens.

Only finite numbers become rewards. A function with `per: token` returns for each response a list of R numbers, one per token of
`rollout.response_ids`; tokens that the policy did not sample (the environment's) must have 0 or None. With `per: turn` it
returns one number per turn, which is paid at the turn's last token. A turn is a segment of sampled tokens, so a response
without an environment has one. None in the place of a list means that the function does not apply to the response. The
response's score includes the sum.
"""

from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal

import numpy as np

from rayrlhf.data.records import Bool, Float32, Rollout
from rayrlhf.errors import UserError

Per = Literal["response", "token", "turn"]


def checked_values(name: str, returned: Any, count: int) -> Float32:
    """Convert returned values to float32 [count], NaN for None.

    Args:
        returned: return value of the function, of any type.
        count: expected number of values.

    Raises:
        UserError: it is not a list of `count` finite numbers or Nones.
    """
    length = length_of(returned)
    if length is None:
        raise UserError(f"reward function {name!r} returned {brief(returned)}, expected a list of {count} numbers")
    if length != count:
        raise UserError(f"reward function {name!r} returned {length} values, expected {count}")
    values = np.empty(count, dtype=np.float32)
    for index, value in enumerate(returned):
        values[index] = np.nan if value is None else _number(name, index, value)
    return values


def _number(name: str, index: int, value: Any) -> np.float32:
    try:
        # float("3") is a number to Python; a reward function that returns text has a mistake in it.
        number = np.float32("nan") if isinstance(value, str | bytes) else np.float32(float(value))
    except (TypeError, ValueError, OverflowError):
        number = np.float32("nan")
    if not np.isfinite(number):
        raise UserError(
            f"reward function {name!r} returned {brief(value)} for sample {index}, expected a finite number or None"
        )
    return number


def length_of(returned: Any) -> int | None:
    """Return the length of a sequence; None for anything else, including text, mappings and sets."""
    try:
        return None if isinstance(returned, str | bytes | Mapping | Set) else len(returned)
    except TypeError:  # also a tensor without dimensions, which has `__len__` but no length
        return None


def brief(value: object) -> str:
    """Return type and value in at most one line."""
    shown = " ".join(repr(value).split())
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def turn_ends(action_mask: Bool) -> np.ndarray:
    """Return the positions of the last tokens of a response's turns, int64 [turns].

    Args:
        action_mask: bool [R].
    """
    return np.flatnonzero(action_mask & ~np.append(action_mask[1:], False))


def token_rewards(name: str, returned: Any, rollouts: Sequence[Rollout], per: Per) -> list[Float32 | None]:
    """Convert returned values to token rewards: float32 [R] or None per response.

    Args:
        name: name of the function, for errors.
        returned: return value of the function, of any type.
        rollouts: [B], the responses.
        per: `token` or `turn`.

    Raises:
        UserError: it is not a list of B lists of the right lengths, or rewards a token that the policy did not sample.
    """
    if length_of(returned) != len(rollouts):
        raise UserError(f"reward function {name!r} returned {brief(returned)}, expected a list of {len(rollouts)} lists")
    return [_response_rewards(name, index, values, rollouts[index], per) for index, values in enumerate(returned)]


def _response_rewards(name: str, index: int, returned: object, rollout: Rollout, per: Per) -> Float32 | None:
    if returned is None:
        return None
    mask = rollout.action_mask
    ends = turn_ends(mask)
    count = len(mask) if per == "token" else len(ends)
    if length_of(returned) != count:
        raise UserError(
            f"reward function {name!r} (per: {per}) returned {brief(returned)} for sample {index}, expected a list of {count} "
            f"numbers, one per {per}"
        )
    values = np.nan_to_num(checked_values(f"{name}, sample {index}", returned, count))
    if per == "turn":
        rewards = np.zeros(len(mask), dtype=np.float32)
        rewards[ends] = values
        return rewards
    outside = np.flatnonzero(~mask & (values != 0))
    if len(outside):
        raise UserError(
            f"reward function {name!r} returned {values[outside[0]]:g} for token {outside[0]} of sample {index}, which the "
            "policy did not sample: expected 0 or None there"
        )
    return values


def add_up(tokens: Mapping[str, Sequence[Float32 | None]], weights: Mapping[str, float]) -> list[Float32 | None]:
    """Return the weighted sum over functions: float32 [R] or None per response; empty without functions.

    Args:
        tokens: name -> token rewards per response, see `token_rewards`.
        weights: name -> factor.
    """
    rows = zip(*([_times(row, weights[name]) for row in rows] for name, rows in tokens.items()), strict=True)
    return [_sum([part for part in row if part is not None]) for row in rows]


def _times(row: Float32 | None, weight: float) -> Float32 | None:
    return None if row is None else row * np.float32(weight)


def _sum(rows: Sequence[Float32]) -> Float32 | None:
    return np.sum(rows, axis=0, dtype=np.float32) if rows else None
