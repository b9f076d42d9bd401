"""Content cache of a reward function's values.

It fits functions whose value for a sample depends only on that sample's arguments. The key is a hash of exactly those arguments
that the function's signature names. None is not cached, because it may mean a temporary failure. Equal samples of one batch are
computed once.
"""

import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rayrlhf.errors import UserError
from rayrlhf.rewards.returned_values import checked_values

MAX_VALUES = 200_000
"""Number of most recently used values to keep; about 30 MB."""


class _Lookup(NamedTuple):
    """Cache lookup of a batch.

    Attributes:
        keys: [B].
        known: key -> cached value.
        arguments: arguments of these rows.
    """

    keys: list[bytes]
    known: dict[bytes, float]
    rows: list[int]
    arguments: dict[str, Any]


class ContentCache:
    """Cache of one function: content -> value."""

    def __init__(self, name: str, max_values: int = MAX_VALUES) -> None:
        """Create an empty cache.

        Args:
            name: name of the function, for errors.
            max_values: number of values to keep.
        """
        self._name, self._max_values = name, max_values
        self._values: dict[bytes, float] = {}
        self.requested = 0
        self.computed = 0

    def call(self, function: Callable[..., Any], offered: Mapping[str, Any], per_sample: Sequence[str]) -> list[float | None]:
        """Call the function on samples that are not cached; returns the values [B] of all.

        Args:
            per_sample: names of the arguments that are lists [B].

        Raises:
            UserError: an argument cannot be hashed, or the function did not return a list of numbers.
            Exception: any exception of the function.
        """
        lookup = self._look_up(offered, per_sample)
        return self._merged(lookup, function(**lookup.arguments) if lookup.rows else [])

    async def call_async(
        self, function: Callable[..., Awaitable[Any]], offered: Mapping[str, Any], per_sample: Sequence[str]
    ) -> list[float | None]:
        """Call a coroutine function, see `call`."""
        lookup = self._look_up(offered, per_sample)
        return self._merged(lookup, await function(**lookup.arguments) if lookup.rows else [])

    def _look_up(self, offered: Mapping[str, Any], per_sample: Sequence[str]) -> _Lookup:
        keys = self._keys(offered, per_sample)
        known = {key: self._values[key] for key in keys if key in self._values}
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in known}
        rows = sorted(first.values())
        cut = {name: [value[row] for row in rows] if name in per_sample else value for name, value in offered.items()}
        self.requested += len(keys)
        self.computed += len(rows)
        return _Lookup(keys, known, rows, cut)

    def _merged(self, lookup: _Lookup, returned: object) -> list[float | None]:
        values = checked_values(self._name, returned, len(lookup.rows)).tolist()
        computed = {lookup.keys[row]: value for row, value in zip(lookup.rows, values, strict=True)}
        found = lookup.known | {key: value for key, value in computed.items() if not math.isnan(value)}
        for key, value in found.items():
            self._values.pop(key, None)  # used values move to the end
            self._values[key] = value
        while len(self._values) > self._max_values:
            del self._values[next(iter(self._values))]
        return [found.get(key) for key in lookup.keys]

    def _keys(self, offered: Mapping[str, Any], per_sample: Sequence[str]) -> list[bytes]:
        lists = {name: offered[name] for name in sorted(per_sample) if name in offered}
        count = len(next(iter(lists.values()), []))
        return [self._key({name: values[row] for name, values in lists.items()}) for row in range(count)]

    def _key(self, content: dict[str, Any]) -> bytes:
        try:
            return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
        except (TypeError, ValueError) as error:
            raise UserError(
                f"reward function {self._name!r}: cache: true needs arguments of text, numbers, lists and mappings; {error}"
            ) from error
