"""Values of a reward function, remembered by content: a sample that it has seen is not given to it again.

For functions whose value for a sample depends on nothing but what they are given for that sample: the same prompt, response and
columns, the same value. What is remembered goes by a hash of exactly those arguments that the function's signature names. A
value of None is not remembered, because it may stand for a failure that has passed. Equal samples of one batch are asked once.
"""

import hashlib
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rayrlhf.errors import UserError
from rayrlhf.rewards.checking import checked_values

MOST_VALUES = 200_000
"""Values that are kept, the latest used ones; about 30 MB."""


class _Question(NamedTuple):
    """What a batch asks: its keys [B], the values known of them, the rows to compute, and the arguments for those rows."""

    keys: list[bytes]
    known: dict[bytes, float]
    rows: list[int]
    arguments: dict[str, Any]


class ContentCache:
    """What one function said of which content."""

    def __init__(self, name: str, most: int = MOST_VALUES) -> None:
        """Begin empty.

        Args:
            name: the function's, for errors.
            most: values that are kept.
        """
        self._name, self._most = name, most
        self._values: dict[bytes, float] = {}
        self.asked = 0
        self.computed = 0

    def call(self, function: Callable[..., Any], offered: Mapping[str, Any], per_sample: Sequence[str]) -> list[float | None]:
        """Call the function with what is not known yet; returns its values [B].

        Args:
            function: the reward function.
            offered: all of its arguments.
            per_sample: names of those that are lists [B].

        Raises:
            UserError: an argument cannot be hashed, or the function returned something that is no list of numbers.
            Exception: whatever the function raises.
        """
        question = self._question(offered, per_sample)
        return self._merged(question, function(**question.arguments) if question.rows else [])

    async def call_async(
        self, function: Callable[..., Awaitable[Any]], offered: Mapping[str, Any], per_sample: Sequence[str]
    ) -> list[float | None]:
        """`call` for a coroutine function."""
        question = self._question(offered, per_sample)
        return self._merged(question, await function(**question.arguments) if question.rows else [])

    def _question(self, offered: Mapping[str, Any], per_sample: Sequence[str]) -> _Question:
        keys = self._keys(offered, per_sample)
        known = {key: self._values[key] for key in keys if key in self._values}
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in known}
        rows = sorted(first.values())
        cut = {name: [value[row] for row in rows] if name in per_sample else value for name, value in offered.items()}
        self.asked += len(keys)
        self.computed += len(rows)
        return _Question(keys, known, rows, cut)

    def _merged(self, question: _Question, returned: Any) -> list[float | None]:
        values = checked_values(self._name, returned, len(question.rows)).tolist()
        computed = {question.keys[row]: value for row, value in zip(question.rows, values, strict=True)}
        found = question.known | {key: value for key, value in computed.items() if not math.isnan(value)}
        for key, value in found.items():
            self._values.pop(key, None)  # what is used goes to the end
            self._values[key] = value
        while len(self._values) > self._most:
            del self._values[next(iter(self._values))]
        return [found.get(key) for key in question.keys]

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
