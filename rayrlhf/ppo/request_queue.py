"""Tracks in-flight requests, so that no sample is lost or counted twice. Pure, without Ray.

Requests are keyed by (step, prompt, sample). A rollout whose key is not open is a late duplicate and is dropped. When a replica
is lost, its open requests go to the others. With `sticky` they wait for the same rank instead, and its whole share is sampled
again, so that every batch keeps its composition and with it its bits.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence

from rayrlhf.data.records import Rollout, RolloutRequest, SampleKey


def assign(requests: Sequence[RolloutRequest], replicas: int) -> list[list[RolloutRequest]]:
    """Split requests over replicas by prompt, evenly in number; the result is deterministic."""
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
    """The open requests: waiting for a replica, or in flight on one.

    Args:
        requests: the first ones, with distinct keys.
        ranks: replicas of the run, serving or not.
        sticky: a share stays with its rank, even when the replica is lost.
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
        """Add further requests, whose keys are new.

        Raises:
            ValueError: the queue is sticky, and the share of a rank cannot grow.
        """
        if self._sticky:
            raise ValueError("requests cannot be added to a sticky queue")
        self._open |= {request.key: request for request in requests}
        self._waiting += requests

    @property
    def ranks(self) -> list[int]:
        """Ranks with requests in flight."""
        return [rank for rank, count in self._in_flight.items() if count]

    @property
    def done(self) -> bool:
        """True when every request has its rollout."""
        return not self._open

    def counts(self) -> dict[str, object]:
        """Return the number of open requests, and of those in flight by rank."""
        return {"open": len(self._open), "in_flight": {str(rank): count for rank, count in list(self._in_flight.items())}}

    def dispatch(self, serving: Sequence[int]) -> dict[int, list[RolloutRequest]]:
        """Put the waiting requests in flight on the serving ranks; returns each rank's new share."""
        shares = {rank: list(self._shares[rank]) for rank in serving if rank in self._due}
        self._due -= set(shares)
        if serving and self._waiting:
            # Requests that a lost rank returned may be of an earlier step than those added since.
            self._waiting.sort(key=lambda request: request.key.step)
            for rank, part in zip(serving, assign(self._waiting, len(serving)), strict=True):
                if part:
                    shares.setdefault(rank, []).extend(part)
            self._waiting = []
        for rank, share in shares.items():
            held = {request.key: rank for request in share if request.key in self._open}
            self._in_flight[rank] += len(held)
            self._holder |= held
        return shares

    def in_flight(self, rank: int) -> int:
        """Return the number of requests in flight on a rank."""
        return self._in_flight[rank]

    def finished(self, rollouts: Iterable[Rollout]) -> list[Rollout]:
        """Close the requests of these rollouts; returns the rollouts without late duplicates."""
        fresh = []
        for rollout in rollouts:
            if self._open.pop(rollout.key, None) is not None:
                holder = self._holder.pop(rollout.key, None)
                if holder is not None:
                    self._in_flight[holder] -= 1
                fresh.append(rollout)
        return fresh

    def release(self, rank: int) -> None:
        """Give the share of an abandoned rank to the others."""
        if rank in self._due:
            self._due.discard(rank)
            self._waiting += [request for request in self._shares[rank] if request.key in self._open]

    def lost(self, rank: int) -> int:
        """Take back the requests in flight on a rank; returns their number."""
        keys = [key for key, holder in self._holder.items() if holder == rank]
        for key in keys:
            del self._holder[key]
        self._in_flight[rank] = 0
        if self._sticky and keys:
            self._due.add(rank)
        else:
            self._waiting += [self._open[key] for key in keys]
        return len(keys)
