"""Which samples share a row of tokens, laid end to end: best-fit decreasing.

Walking from the longest sample down, each goes where it leaves the least room free, and to a new pack where it fits nowhere.
That takes at most 11/9 of the fewest possible packs, plus four (Johnson 1973); packs of a few thousand tokens come out full but
for a percent. It gives the packs of TRL's `bfd`, but never cuts a sample.
"""

from collections import deque
from collections.abc import Sequence

Pack = list[int]
"""Indices of the samples that lie in it, the longest first."""


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[Pack]:
    """Pack samples into as few rows as can be found quickly.

    Sorting takes n log n steps; after that a sample takes one look at the set of free spaces, a bit set of `capacity` bits.

    Args:
        lengths: tokens of each sample, in [1, capacity].
        capacity: tokens a pack can hold.

    Returns:
        Packs of indices into `lengths`, each index exactly once; a function of the arguments alone (among samples of one length
        the earlier goes first, among packs with the same space the older is filled).

    Raises:
        ValueError: a length is out of range.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"sample {index} has length {length}, expected 1 to the capacity of {capacity}")
    packs: list[Pack] = []
    by_space: dict[int, deque[Pack]] = {}
    spaces = 0  # Bit s is set where some pack has exactly s tokens free.
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = int(lengths[index])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            pack = by_space[space].popleft()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, pack = capacity, []
            packs.append(pack)
        pack.append(index)
        if left := space - length:
            by_space.setdefault(left, deque()).append(pack)
            spaces |= 1 << left
    return packs


def packed_share(lengths: Sequence[int], packs: Sequence[Pack], capacity: int) -> float:
    """Return the share of the packs' room that samples fill, in [0, 1]; 1 when there are no packs."""
    return sum(lengths[index] for pack in packs for index in pack) / (capacity * len(packs)) if packs else 1.0
