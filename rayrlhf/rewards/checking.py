"""What a reward function returned, checked: only finite numbers become rewards."""

from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from rayrlhf.data.records import Float32
from rayrlhf.errors import UserError


def checked_values(name: str, returned: Any, count: int) -> Float32:
    """Turn what a function returned into float32 [count], NaN for None.

    Args:
        name: the function's.
        returned: anything.
        count: how many values were asked for.

    Raises:
        UserError: it is no list of `count` finite numbers or Nones.
    """
    length = length_of(returned)
    if length is None:
        raise UserError(f"reward function {name!r} returned {brief(returned)}, expected a list of {count} numbers")
    if length != count:
        raise UserError(f"reward function {name!r} was asked for {count} values and returned {length}")
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
    """Return the length of a sequence; None for what is none, as text, mappings and sets are not."""
    try:
        return None if isinstance(returned, str | bytes | Mapping | Set) else len(returned)
    except TypeError:  # also a tensor without dimensions, which has `__len__` but no length
        return None


def brief(value: Any) -> str:
    """Return what a value is, in at most a line."""
    shown = " ".join(repr(value).split())
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
