"""Rewards within a response: which token each one belongs to.

A function with `per: token` returns for each response a list of R numbers, one a token of `rollout.response_ids`; tokens that
the policy did not sample (an environment's) take 0 or None. With `per: turn` it returns one number a turn, which is paid at the
turn's last token; a turn is a stretch of sampled tokens, so a response without an environment has one. None in the place of a
list means that the function does not apply to the response. The response's score counts the sum.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from rayrlhf.data.records import Bool, Float32, Rollout
from rayrlhf.errors import UserError
from rayrlhf.rewards.checking import brief, checked_values, length_of

Per = Literal["response", "token", "turn"]


def turn_ends(action_mask: Bool) -> np.ndarray:
    """Places of the last tokens of a response's turns, int64 [turns].

    Args:
        action_mask: bool [R].
    """
    return np.flatnonzero(action_mask & ~np.append(action_mask[1:], False))


def place(name: str, returned: Any, rollouts: Sequence[Rollout], per: Per) -> list[Float32 | None]:
    """Turn what a function returned into rewards per token: for each response float32 [R], or None where it does not apply.

    Args:
        name: the function's, for errors.
        returned: anything.
        rollouts: [B], the responses.
        per: `token` or `turn`.

    Raises:
        UserError: it is no list of B lists of the right lengths, or a token that the policy did not sample was paid.
    """
    if length_of(returned) != len(rollouts):
        raise UserError(f"reward function {name!r} returned {brief(returned)}, expected a list of {len(rollouts)} lists")
    return [_placed(name, index, given, rollouts[index], per) for index, given in enumerate(returned)]


def _placed(name: str, index: int, given: Any, rollout: Rollout, per: Per) -> Float32 | None:
    if given is None:
        return None
    mask = rollout.action_mask
    ends = turn_ends(mask)
    count = len(mask) if per == "token" else len(ends)
    if length_of(given) != count:
        raise UserError(
            f"reward function {name!r} (per: {per}) returned {brief(given)} for sample {index}, expected a list of {count} "
            f"numbers, one a {per}"
        )
    values = np.nan_to_num(checked_values(f"{name}, sample {index}", given, count))
    if per == "turn":
        rewards = np.zeros(len(mask), dtype=np.float32)
        rewards[ends] = values
        return rewards
    outside = np.flatnonzero(~mask & (values != 0))
    if len(outside):
        raise UserError(
            f"reward function {name!r} paid {values[outside[0]]:g} for token {outside[0]} of sample {index}, which the policy "
            "did not sample: expected 0 or None there"
        )
    return values


def add_up(tokens: Mapping[str, Sequence[Float32 | None]], weights: Mapping[str, float]) -> list[Float32 | None]:
    """Weighted sum over functions, for each response float32 [R] or None; no responses for no functions.

    Args:
        tokens: name -> for each response what `place` returned.
        weights: name -> factor.
    """
    rows = zip(*([_times(row, weights[name]) for row in rows] for name, rows in tokens.items()), strict=True)
    return [_sum([row for row in given if row is not None]) for given in rows]


def _times(row: Float32 | None, weight: float) -> Float32 | None:
    return None if row is None else row * np.float32(weight)


def _sum(rows: Sequence[Float32]) -> Float32 | None:
    return np.sum(rows, axis=0, dtype=np.float32) if rows else None
