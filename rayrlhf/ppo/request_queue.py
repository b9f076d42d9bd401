"""Who has which requests: the books by which no sample is lost and none is taken twice. Pure, without Ray.

Work is keyed by (step, prompt, sample). A rollout whose key is not open is a late duplicate and is dropped. When a replica
is lost, its open requests go to the others; with `sticky` they wait for the same rank instead and its whole share is sampled
again, so that every batch keeps its composition and with it its bits.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence

from rayrlhf.data.records import Rollout, RolloutRequest, SampleKey


def assign(requests: Sequence[RolloutRequest], replicas: int) -> list[list[RolloutRequest]]:
    """Split requests over replicas by prompt, evenly in number; the same requests always split the same way."""
    groups: dict[int, list[RolloutRequest]] = {}
    for request in requests:
        groups.setdefault(request.key.prompt, []).append(request)
    shares: list[list[RolloutRequest]] = [[] for _ in range(replicas)]
    shortest = [(0, index) for index in range(replicas)]
    for group in groups.values():
        size, index = shortest[0]
        heapq.heapreplace(shortest, (size + len(group), index))
        shares[index].extend(group)
    return shares


class RequestQueue:
    """The requests that are being sampled.

    Args:
        requests: to begin with, keys distinct.
        ranks: replicas of the run, whether they serve or not.
        sticky: a share belongs to its rank, come what may.
    """

    def __init__(self, requests: Sequence[RolloutRequest], ranks: int, *, sticky: bool) -> None:
        self._open = {request.key: request for request in requests}
        self._sticky = sticky
        self._shares = dict(enumerate(assign(requests, ranks)))
        self._waiting: list[RolloutRequest] = [] if sticky else list(requests)
        self._due: set[int] = {rank for rank, share in self._shares.items() if share} if sticky else set()
        self._holder: dict[SampleKey, int] = {}
        self._in_flight: Counter[int] = Counter()

    def add(self, requests: Sequence[RolloutRequest]) -> None:
        """Take in further requests, whose keys are new.

        Raises:
            ValueError: a share that belongs to its rank cannot grow.
        """
        if self._sticky:
            raise ValueError("requests cannot be added to shares that belong to their ranks")
        self._open |= {request.key: request for request in requests}
        self._waiting += requests

    @property
    def ranks(self) -> list[int]:
        """Ranks that owe something."""
        return [rank for rank, owed in self._in_flight.items() if owed]

    @property
    def done(self) -> bool:
        """Whether every request has its rollout."""
        return not self._open

    def dispatch(self, serving: Sequence[int]) -> dict[int, list[RolloutRequest]]:
        """What to send to the ranks that serve now; what is sent is theirs until `finished` or `lost`."""
        given = {rank: list(self._shares[rank]) for rank in serving if rank in self._due}
        self._due -= set(given)
        if serving and self._waiting:
            # What was taken back from a rank may be of an earlier step than what has been added since.
            self._waiting.sort(key=lambda request: request.key.step)
            for rank, part in zip(serving, assign(self._waiting, len(serving)), strict=True):
                if part:
                    given.setdefault(rank, []).extend(part)
            self._waiting = []
        for rank, share in given.items():
            held = {request.key: rank for request in share if request.key in self._open}
            self._in_flight[rank] += len(held)
            self._holder |= held
        return given

    def holds(self, rank: int) -> bool:
        """Whether a rank still owes something."""
        return self._in_flight[rank] > 0

    def finished(self, rollouts: Iterable[Rollout]) -> list[Rollout]:
        """Close the requests of these rollouts; returns those that were open, so late duplicates are not among them."""
        fresh = []
        for rollout in rollouts:
            if self._open.pop(rollout.key, None) is not None:
                holder = self._holder.pop(rollout.key, None)
                if holder is not None:
                    self._in_flight[holder] -= 1
                fresh.append(rollout)
        return fresh

    def release(self, rank: int) -> None:
        """Let the others have the share of a rank that will not come back."""
        if rank in self._due:
            self._due.discard(rank)
            self._waiting += [request for request in self._shares[rank] if request.key in self._open]

    def lost(self, rank: int) -> int:
        """Take back what a rank owes; returns how many requests."""
        owed = [key for key, holder in self._holder.items() if holder == rank]
        for key in owed:
            del self._holder[key]
        self._in_flight[rank] = 0
        if self._sticky and owed:
            self._due.add(rank)
        else:
            self._waiting += [self._open[key] for key in owed]
        return len(owed)
