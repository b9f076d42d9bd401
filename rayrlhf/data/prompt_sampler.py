"""The order in which prompts are used, and a cursor that loses none of them.

The sampler is an endless stream: every epoch is a permutation of the dataset that depends on (seed, epoch) alone, so the order
does not change with the batch size. It remembers which prompts are out with the driver; a run that resumes gets exactly those
again before anything new, so no prompt is lost and none is trained on twice.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from rayrlhf.data.records import Prompt
from rayrlhf.errors import UserError


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """Return 0 .. count-1 in an order that depends on (count, seed, epoch) alone, the same with every version of NumPy."""
    # Sorting raw generator output: NumPy promises to keep that stream, but not the one of `Generator.permutation`.
    generator = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    return [int(index) for index in np.argsort(generator.random_raw(count), kind="stable")]


class PromptSampler:
    """Hands out prompts, epoch after epoch, and keeps the books.

    Args:
        prompts: the dataset, not empty, ids distinct.
        seed: of the permutations.
        shuffle: False keeps the order of the dataset in every epoch.

    Raises:
        ValueError: no prompts, or two with the same id.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise ValueError("a sampler needs at least one prompt")
        self._by_id = {prompt.id: prompt for prompt in prompts}
        if len(self._by_id) != len(prompts):
            raise ValueError("two prompts have the same id")
        self._ids = [prompt.id for prompt in prompts]
        self._seed = seed
        self._shuffle = shuffle
        self._issued = 0
        self._out: list[int] = []
        self._again: deque[int] = deque()
        self._epoch_order: tuple[int, list[int]] = (-1, [])

    @property
    def epoch(self) -> float:
        """Passes over the dataset, counted by what is consumed."""
        return (self._issued - len(self._out) - len(self._again)) / len(self._ids)

    def next(self, count: int) -> list[Prompt]:
        """Return the next `count` prompts of the stream; after a resume first those that were out when the state was taken.

        A dataset smaller than `count` gives the same prompt more than once.
        """
        ids = [self._again.popleft() if self._again else self._draw() for _ in range(count)]
        self._out += ids
        return [self._by_id[prompt] for prompt in ids]

    def consumed(self, ids: Iterable[int]) -> None:
        """Mark prompts as trained on; an id that was handed out twice is marked once for each time it is given.

        Raises:
            ValueError: an id that is not out; nothing is marked then.
        """
        done = Counter(ids)
        kept = []
        for prompt in self._out:
            if done[prompt]:
                done[prompt] -= 1
            else:
                kept.append(prompt)
        if done.total():
            raise ValueError(f"prompts {sorted(+done)} are not out, so they cannot be consumed")
        self._out = kept

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor as plain numbers and strings.

        `issued` and `outstanding` fix what is consumed: the first `issued` prompts of the stream but for those outstanding.
        """
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "prompts": len(self._ids),
            "digest": self._digest,
            "issued": self._issued,
            "outstanding": [*self._out, *self._again],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`: what was outstanding is handed out again first, then the stream continues.

        Raises:
            UserError: the dataset, the seed or the shuffling is not the one of the state.
        """
        here = self.state_dict()
        for name in ("prompts", "digest", "seed", "shuffle"):
            if state[name] != here[name]:
                what = "their text or order" if name == "digest" else f"{name} {state[name]} -> {here[name]}"
                raise UserError(f"data.train: the prompts are not those that this run began with ({what}); start a new run")
        self._issued = state["issued"]
        self._out = []
        self._again = deque(state["outstanding"])

    def _draw(self) -> int:
        epoch, place = divmod(self._issued, len(self._ids))
        if self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, self._order(epoch))
        self._issued += 1
        return self._epoch_order[1][place]

    def _order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return self._ids
        return [self._ids[index] for index in permutation(len(self._ids), self._seed, epoch)]

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self._by_id.values():
            digest.update(np.array([prompt.id, len(prompt.token_ids)], dtype=np.int64).tobytes())
            digest.update(np.ascontiguousarray(prompt.token_ids, dtype=np.int32).tobytes())
        return digest.hexdigest()
