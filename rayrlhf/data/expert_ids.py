"""Expert ids of mixture-of-experts layers as compact integers [tokens, layers, experts per token].

The largest number of the dtype marks a token whose experts are unknown, where the trained model makes its own choice.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ExpertIds = NDArray[np.uint8] | NDArray[np.uint16]
"""uint8 for models with fewer than 255 experts, otherwise uint16."""
OWN_CHOICE = -1
"""Number of unknown experts in wide ids."""


def compact(parts: Sequence[tuple[int, NDArray[Any]]], length: int, experts: int) -> ExpertIds:
    """Join captured ids to those of a sample of `length` tokens.

    Args:
        parts: the first position and the ids [n, layers, experts per token] of each forward pass. The first one counts at a
            position that was computed twice.
        length: tokens of the sample. Those without a part are unknown.
        experts: experts of a layer.
    """
    dtype = np.uint8 if experts < np.iinfo(np.uint8).max else np.uint16
    ids = np.full((length, *parts[0][1].shape[1:]), np.iinfo(dtype).max, dtype)
    for start, part in reversed(parts):
        room = max(0, length - start)
        ids[start : start + len(part)] = part[:room]
    return ids


def widen(ids: ExpertIds) -> NDArray[np.int16]:
    """Return ids as int16, with `OWN_CHOICE` where they are unknown."""
    wide = ids.astype(np.int16)
    wide[ids == np.iinfo(ids.dtype).max] = OWN_CHOICE
    return wide
