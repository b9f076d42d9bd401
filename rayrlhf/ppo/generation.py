"""Dispatches rollout requests to replicas and collects finished rollouts.

Requests are sent in one message per replica and return in batches, because a Ray call per sample would cost more than the
sample's tokens on a small model. All samples of one prompt go to the same replica, where they share its prefix cache. A lost
replica costs time only: its open requests are sampled again, with the same seeds.

Requests may be added long before their rollouts are collected. Rollouts that finish during another wait are kept until then.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import ray

from rayrlhf.actors.remote import Handle, Ref
from rayrlhf.actors.replica_pool import ReplicaPool, RolloutReplica
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.actors.waiting import fetch, overrun, track_calls
from rayrlhf.data.records import Records, Rollout, RolloutRequest, SampleKey
from rayrlhf.errors import ActorLostError
from rayrlhf.ppo.request_queue import RequestQueue
from rayrlhf.ppo.sample_ledger import fault

GENERATE = "generate"
MESSAGE_SIZE = 32
"""Fewest finished rollouts worth one Ray message."""
POLL_SECONDS = 0.5
"""Longest poll where weights change while requests are in flight."""
TICK_SECONDS = 1.0
"""Seconds between checks of replicas that are being rebuilt."""


class _Poll(NamedTuple):
    """A pending `poll` and its process, which may have been replaced since.

    Attributes:
        requests: number in flight there when it began.
    """

    result: Ref[tuple[list[Rollout], int]]
    handle: Handle[RolloutActor]
    name: str
    requests: int


@dataclass
class GenerationBatch:
    """Requests that were added together.

    Attributes:
        temperature: of sampling.
        missing: unfinished requests.
        finished: rollouts that are not collected yet.
    """

    requests: Sequence[RolloutRequest]
    temperature: float
    missing: set[SampleKey]
    finished: list[Rollout] = field(default_factory=list)


class Generation:
    """Sends requests to the replicas and receives their rollouts.

    Args:
        refresh: sends the current weights to rebuilt replicas, which then count as serving.
        max_new_tokens: longest response.
        seconds: longest time in which no replica finishes a response.
        sticky: see `RequestQueue`.
        poll_seconds: longest time of one poll, for which new weights may have to wait; None for no bound.

    Attributes:
        served_by: rank of the replica that sampled each finished response.
    """

    def __init__(
        self,
        pool: ReplicaPool,
        refresh: Callable[[Sequence[RolloutReplica]], None],
        max_new_tokens: int,
        seconds: float,
        *,
        sticky: bool = False,
        poll_seconds: float | None = None,
    ) -> None:
        self._pool = pool
        self._refresh = refresh
        self._max_new_tokens = max_new_tokens
        self._seconds = seconds
        self._sticky = sticky
        self._poll_seconds = poll_seconds
        self._queue = RequestQueue([], 0, sticky=False)
        self._batches: dict[SampleKey, GenerationBatch] = {}
        self._polls: dict[int, _Poll] = {}
        self._submits: dict[int, list[Ref[None]]] = {}
        self._pending: dict[str, float] = {}
        self._sent_to: dict[int, Handle[RolloutActor]] = {}
        self.served_by: dict[SampleKey, int] = {}

    def add(self, requests: Sequence[RolloutRequest], temperature: float) -> GenerationBatch:
        """Add requests, to be sampled at a temperature (0 is greedy) during any wait.

        Raises:
            ValueError: a request with this key is in flight already, for example one that was issued ahead.
        """
        known = next((request.key for request in requests if request.key in self._batches), None)
        if known is not None:
            raise ValueError(f"request {known} is in flight already")
        if self._queue.done:
            self._queue = RequestQueue(requests, len(self._pool.replicas), sticky=self._sticky)
        else:
            self._queue.add(requests)
        batch = GenerationBatch(requests, temperature, {request.key for request in requests})
        self._batches |= dict.fromkeys((request.key for request in requests), batch)
        return batch

    def collect(self, batch: GenerationBatch) -> Iterator[list[Rollout]]:
        """Wait for the requests of a batch; yields their rollouts as they finish, each once.

        Raises:
            DeadlineError: no response finished for too long, and rebuilding did not help.
            ActorLostError: too few replicas are left.
            AlarmError: a request has no rollout and is in flight nowhere.
        """
        progress = time.monotonic()
        with track_calls(GENERATE, self._pending):
            while batch.missing or batch.finished:
                if batch.finished:
                    finished, batch.finished = batch.finished, []
                    yield finished
                    continue
                if self._queue.done:
                    lost = min(batch.missing)
                    raise fault(lost.step, lost, "was issued and got lost while it was sampled")
                self._pool.poll_rebuilds()
                if self._pool.stale:
                    self._refresh(self._pool.stale)
                self._dispatch()
                for replica in self._next_ready(time.monotonic() - progress):
                    if self._receive(replica):
                        progress = time.monotonic()
        for request in batch.requests:
            del self._batches[request.key]

    def meanwhile(self, calls: Mapping[str, Ref[object]], seconds: float) -> None:
        """Keep the replicas busy until one of these calls returns or `seconds` are over.

        The policy may be busy with one of them, so rebuilt replicas are synced later.
        """
        end, waited = time.monotonic() + seconds, list(calls.values())
        with track_calls(GENERATE, self._pending):
            while not self._queue.done and time.monotonic() < end and not ray.wait(waited, timeout=0)[0]:
                self._pool.poll_rebuilds()
                self._dispatch()
                polls = [poll.result for poll in self._polls.values()]
                ray.wait([*waited, *polls], timeout=min(TICK_SECONDS, max(end - time.monotonic(), 0.0)))
                for replica in self._ready(polls):
                    self._receive(replica)

    def vitals(self) -> dict[str, object]:
        """Return the number of unfinished requests, and of those in flight by rank."""
        return self._queue.counts()

    def cut(self) -> int:
        """Cancel the requests in flight on the replicas; the next wait dispatches them again.

        Returns:
            The tokens that were sampled for them, without those of lost replicas.
        """
        serving, tokens = {replica.rank: replica for replica in self._pool.serving}, 0
        for rank in [rank for rank in self._queue.ranks if rank in serving]:
            replica = serving[rank]
            canceled = replica.cancel()  # after the poll in progress, as the actor runs one call at a time
            if not ray.wait([canceled], timeout=self._seconds)[0]:
                self._pool.lost(replica, overrun(GENERATE, [replica.name], self._seconds))
                continue
            if rank in self._polls:
                self._receive(replica)
            with suppress(ActorLostError):
                tokens += fetch(canceled, GENERATE, replica.name)
        for rank in self._queue.ranks:
            self._drop(rank)
        return tokens

    def reset(self) -> int:
        """Drop all requests, here and on the replicas; returns the tokens sampled for them."""
        tokens, batches = self.cut(), {id(batch): batch for batch in self._batches.values()}
        self._queue = RequestQueue([], 0, sticky=False)
        self._batches.clear()
        return tokens + sum(len(rollout.response_ids) for batch in batches.values() for rollout in batch.finished)

    def forget(self, step: int) -> None:
        """Drop the ranks of the responses of steps before `step`."""
        self.served_by = {key: rank for key, rank in self.served_by.items() if key.step >= step}

    def _drop(self, rank: int) -> None:
        """Take back the requests in flight on a rank, and stop waiting for it."""
        if rank in self._polls:
            self._pending.pop(self._polls.pop(rank).name, None)
        self._submits.pop(rank, None)
        self._queue.lost(rank)

    def _dispatch(self) -> None:
        queue, replicas = self._queue, self._pool.replicas
        for rank in {*self._polls, *queue.ranks}:
            if rank >= len(replicas) or self._is_gone(rank, replicas[rank]):
                self._drop(rank)
        serving = {replica.rank: replica for replica in self._pool.serving}
        for replica in replicas:
            if replica.health.state == "abandoned":
                queue.release(replica.rank)
        for rank, share in queue.dispatch(list(serving)).items():
            for temperature, part in groupby(share, key=lambda request: self._batches[request.key].temperature):
                submit = serving[rank].submit(Records(part), temperature, self._max_new_tokens)
                self._submits.setdefault(rank, []).append(submit)
            self._sent_to[rank] = serving[rank].handle
        for rank, replica in serving.items():
            if rank not in self._polls and queue.in_flight(rank):
                result = replica.poll(MESSAGE_SIZE, self._poll_seconds)
                self._polls[rank] = _Poll(result, replica.handle, replica.name, queue.in_flight(rank))
                self._pending[replica.name] = time.monotonic()

    def _is_gone(self, rank: int, replica: RolloutReplica) -> bool:
        """True when the process that received a rank's requests is gone."""
        return replica.handle is not self._sent_to[rank] or replica.health.state in ("down", "abandoned")

    def _next_ready(self, idle: float) -> list[RolloutReplica]:
        """Wait for a finished poll; returns all replicas with one.

        The result is empty when a replica was rebuilt first, or nothing happened for a second.
        """
        waited = [*(poll.result for poll in self._polls.values()), *self._pool.building.values()]
        if idle > self._seconds:
            late = [self._pool.replicas[rank] for rank in self._polls]
            error = overrun(GENERATE, [replica.name for replica in late], self._seconds)
            if not late:
                raise error
            for replica in late:
                self._pool.lost(replica, error)
            return late[:1]
        left = max(self._seconds - idle, 0.0) + 0.01
        if self._pool.losses:
            left = min(left, TICK_SECONDS)
        if not waited:
            time.sleep(min(left, TICK_SECONDS))
            return []
        ray.wait(waited, num_returns=1, timeout=left)
        return self._ready(waited)

    def _ready(self, waited: Sequence[Ref[object]]) -> list[RolloutReplica]:
        """Return the replicas whose poll is finished."""
        if not waited:
            return []
        # A thousand replicas finish in bursts: one check of all of them costs no more than of one.
        ready = set(ray.wait(list(waited), num_returns=len(waited), timeout=0)[0])
        return [self._pool.replicas[rank] for rank, poll in self._polls.items() if poll.result in ready]

    def _receive(self, replica: RolloutReplica) -> bool:
        """Receive the rollouts of a poll, or take back a lost replica's requests.

        A replica that has forgotten a request counts as lost: its polls would end at once and without a rollout.

        Returns:
            False if the replica serves and the poll ended without a rollout.
        """
        poll, submits = self._polls.pop(replica.rank), self._submits.pop(replica.rank, [])
        self._pending.pop(replica.name, None)
        try:
            for submit in submits:
                fetch(submit, GENERATE, replica.name)
            finished, unfinished = fetch(poll.result, GENERATE, replica.name)
        except ActorLostError as error:
            if poll.handle is replica.handle:
                self._pool.lost(replica, error)
            self._queue.lost(replica.rank)
            return True
        open_before = self._queue.in_flight(replica.rank)
        for rollout in self._queue.finished(finished):
            batch = self._batches[rollout.key]
            self.served_by[rollout.key] = replica.rank
            batch.missing.discard(rollout.key)
            batch.finished.append(rollout)
        forgotten = poll.requests - (open_before - self._queue.in_flight(replica.rank)) - unfinished
        if forgotten > 0 and poll.handle is replica.handle:
            reason = f"{replica.name} has forgotten {forgotten} of {poll.requests} requests"
            self._pool.lost(replica, ActorLostError(reason, replica.name))
            self._queue.lost(replica.rank)
        return bool(finished) or not replica.health.serves
