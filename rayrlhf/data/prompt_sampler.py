"""Prompt order and a resumable cursor over it.

The sampler is an endless stream: every epoch is a permutation of the dataset that depends only on (seed, epoch), so the order
does not change with the batch size. It tracks the prompts that were issued and not yet trained on. A resumed run gets exactly
those first, so no prompt is lost and none is trained on twice.
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
    """Return a permutation of 0 .. count-1, the same with every NumPy version."""
    # Sort raw generator output: NumPy guarantees a stable stream for it, but not for `Generator.permutation`.
    generator = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    return [int(index) for index in np.argsort(generator.random_raw(count), kind="stable")]


class PromptSampler:
    """Issues prompts epoch after epoch and tracks those not yet trained on.

    Args:
        prompts: the dataset, not empty, with distinct ids.
        seed: seed of the permutations.
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
    def size(self) -> int:
        """Number of prompts of a pass."""
        return len(self._ids)

    @property
    def issued(self) -> int:
        """Prompts drawn from the stream so far; those issued again after a resume count once."""
        return self._issued

    @property
    def outstanding(self) -> list[int]:
        """Ids of prompts that were issued and not consumed."""
        return [*self._out, *self._again]

    @property
    def epoch(self) -> float:
        """Number of passes over the dataset, by consumed prompts."""
        return (self._issued - len(self._out) - len(self._again)) / len(self._ids)

    def next(self, count: int) -> list[Prompt]:
        """Return the next `count` prompts; after a resume, the outstanding ones first.

        With a dataset smaller than `count` a prompt occurs more than once.
        """
        ids = [self._again.popleft() if self._again else self._draw() for _ in range(count)]
        self._out += ids
        return [self._by_id[prompt] for prompt in ids]

    def consumed(self, ids: Iterable[int]) -> None:
        """Mark prompts as trained on, once per occurrence of an id.

        Raises:
            ValueError: an id that is not outstanding; nothing is marked then.
        """
        done = Counter(ids)
        kept = []
        for prompt in self._out:
            if done[prompt]:
                done[prompt] -= 1
            else:
                kept.append(prompt)
        if done.total():
            raise ValueError(f"prompts {sorted(+done)} are not outstanding, so they cannot be consumed")
        self._out = kept

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor as plain numbers and strings.

        Consumed are the first `issued` prompts of the stream except those in `outstanding`.
        """
        return {
            "seed": self._seed,
            "shuffle": self._shuffle,
            "prompts": len(self._ids),
            "digest": self._digest,
            "issued": self._issued,
            "outstanding": self.outstanding,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`: outstanding prompts are issued again first.

        Raises:
            UserError: the dataset, the seed or the shuffling differs from the state.
        """
        here = self.state_dict()
        for name in ("prompts", "digest", "seed", "shuffle"):
            if state[name] != here[name]:
                what = "their text or order" if name == "digest" else f"{name} {state[name]} -> {here[name]}"
                raise UserError(
                    f"data.train: the prompts differ from those that this run started with ({what}); start a new run"
                )
        self._issued = state["issued"]
        self._out = []
        self._again = deque(state["outstanding"])

    def _draw(self) -> int:
        epoch, place = divmod(self._issued, len(self._ids))
        self._issued += 1
        return self.order(epoch)[place]

    def order(self, epoch: int) -> list[int]:
        """Return the ids of a pass in stream order, not to be changed."""
        if not self._shuffle:
            return self._ids
        if self._epoch_order[0] != epoch:
            self._epoch_order = epoch, [self._ids[index] for index in permutation(len(self._ids), self._seed, epoch)]
        return self._epoch_order[1]

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self._by_id.values():
            digest.update(np.array([prompt.id, len(prompt.token_ids)], dtype=np.int64).tobytes())
            digest.update(np.ascontiguousarray(prompt.token_ids, dtype=np.int32).tobytes())
        return digest.hexdigest()
