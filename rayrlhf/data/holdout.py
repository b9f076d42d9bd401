"""Held-out rows for evaluation, selected only by a hash of the row's group.

Rows of one group stay on one side. SFT, reward model and later stages that group by the same question hold out the same rows,
independent of seeds, order, and the other rows of the file.
"""

import hashlib
import json
from collections.abc import Sequence


def group_key(value: object) -> str:
    """Return the group name of a row's value: text unchanged, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def held_out(groups: Sequence[str], share: float) -> list[bool]:
    """Return True for each row that is held out.

    Args:
        share: share of the groups, in (0, 1). Groups are drawn independently, so about this many are held out; at least one
            is held out, and at least one is kept.

    Raises:
        ValueError: there are fewer than two groups.
    """
    places = {group: _place(group) for group in groups}
    if len(places) < 2:
        raise ValueError("expected at least two groups")
    ordered = sorted(places, key=lambda group: (places[group], group))
    count = sum(place < share for place in places.values())
    chosen = set(ordered[: min(max(count, 1), len(ordered) - 1)])
    return [group in chosen for group in groups]


def _place(group: str) -> float:
    """Return a pseudorandom number in [0, 1) that depends only on the group."""
    digest = hashlib.blake2b(group.encode(errors="surrogatepass"), digest_size=8, person=b"holdout").digest()
    return int.from_bytes(digest, "little") / 2**64
