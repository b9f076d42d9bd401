"""Which rows are held out for evaluation: decided by a hash of a row's group, and by nothing else.

So rows of one question stay on one side, and SFT, reward model and any later stage that groups by the same question hold out
the same ones, whatever their seeds, their order, and what else is in their files.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any


def group_key(value: Any) -> str:
    """Return a group's name from a value of a row: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def held_out(groups: Sequence[str], share: float) -> list[bool]:
    """Return which rows are held out.

    Args:
        groups: the group of each row.
        share: of the groups, in (0, 1). Each is drawn by itself, so about this many are held out; at least one is, and at least
            one is left.

    Raises:
        ValueError: there are fewer than two groups.
    """
    places = {group: _place(group) for group in groups}
    if len(places) < 2:
        raise ValueError("fewer than two groups cannot be divided")
    ordered = sorted(places, key=lambda group: (places[group], group))
    count = sum(place < share for place in places.values())
    chosen = set(ordered[: min(max(count, 1), len(ordered) - 1)])
    return [group in chosen for group in groups]


def _place(group: str) -> float:
    """Return a number in [0, 1) that looks random and depends on the group alone."""
    digest = hashlib.blake2b(group.encode(errors="surrogatepass"), digest_size=8, person=b"holdout").digest()
    return int.from_bytes(digest, "little") / 2**64
