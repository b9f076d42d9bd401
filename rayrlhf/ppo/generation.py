"""Sampling responses on the rollout replicas, streamed back as they finish.

Requests go out in one message a replica and come back in batches, because a Ray call per sample would cost more than the
sample's tokens on a small model. All samples of one prompt go to the same replica, where they share its prefix cache. A
replica that is lost meanwhile costs time and nothing else: its open requests are sampled again, with the same seeds.

Requests may be added long before somebody collects their rollouts. What finishes while another wait goes on is kept until then.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import ray

from rayrlhf.actors.pending_calls import track_calls
from rayrlhf.actors.remote import Handle, Ref
from rayrlhf.actors.replica_pool import ReplicaPool, RolloutReplica
from rayrlhf.actors.rollout_actor import RolloutActor
from rayrlhf.actors.waiting import fetch, overrun
from rayrlhf.data.records import Prompt, Records, Rollout, RolloutRequest, SampleKey
from rayrlhf.data.seeds import sample_seed
from rayrlhf.errors import ActorLostError
from rayrlhf.ppo.request_queue import RequestQueue

GENERATE = "generate"
MESSAGE_SIZE = 32
"""Fewest finished rollouts worth one Ray message."""
POLL_SECONDS = 0.5
"""Longest poll where weights change while requests are unfinished."""
TICK_SECONDS = 1.0
"""How often a wait looks at replicas that are being rebuilt."""


def make_requests(
    prompts: Sequence[Prompt], samples_per_prompt: int, step: int, run_seed: int, seen: dict[int, int] | None = None
) -> list[RolloutRequest]:
    """One request per (prompt, sample). A prompt that occurs again in the step continues the sample numbers of its group.

    Args:
        prompts: in the order of the stream.
        samples_per_prompt: requests for each of them.
        step: of the run.
        run_seed: of the run.
        seen: prompt id -> its first free sample number, kept up to date, for a step that samples in several calls.
    """
    seen = {} if seen is None else seen
    requests = []
    for prompt in prompts:
        first = seen.get(prompt.id, 0)
        seen[prompt.id] = first + samples_per_prompt
        for sample in range(first, first + samples_per_prompt):
            seed = sample_seed(run_seed, step, prompt.id, sample)
            read = prompt.token_ids if prompt.context_ids is None else prompt.context_ids
            requests.append(RolloutRequest(SampleKey(step, prompt.id, sample), read, seed))
    return requests


class _Poll(NamedTuple):
    """A pending `poll`, and the process it was sent to: the replica may have another one since."""

    answer: Ref[tuple[list[Rollout], int]]
    handle: Handle[RolloutActor]
    name: str


@dataclass
class GenerationBatch:
    """Requests that were added together.

    Attributes:
        requests: all of them.
        temperature: of sampling.
        missing: how many are not finished.
        finished: rollouts that nobody has collected yet.
    """

    requests: Sequence[RolloutRequest]
    temperature: float
    missing: int
    finished: list[Rollout] = field(default_factory=list)


class Generation:
    """The way of all requests through the replicas.

    Args:
        pool: the replicas.
        refresh: gives the current weights to rebuilt replicas, which then count as serving.
        max_new_tokens: longest response.
        seconds: longest time in which no replica finishes anything.
        sticky: see `RequestQueue`.
        poll_seconds: longest time of one poll, which is what new weights may have to wait for; None for no bound.
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
        self._book = RequestQueue([], 0, sticky=False)
        self._batches: dict[SampleKey, GenerationBatch] = {}
        self._polls: dict[int, _Poll] = {}
        self._submits: dict[int, list[Ref[None]]] = {}
        self._pending: dict[str, float] = {}
        self._given: dict[int, Handle[RolloutActor]] = {}

    def add(self, requests: Sequence[RolloutRequest], temperature: float) -> GenerationBatch:
        """Take in requests, to be sampled at a temperature (0 is greedy) whenever somebody waits for something.

        Raises:
            ValueError: a request whose key is on its way already, as when what is sampled ahead is sampled by hand too.
        """
        known = next((request.key for request in requests if request.key in self._batches), None)
        if known is not None:
            raise ValueError(f"request {known} is on its way already")
        if self._book.done:
            self._book = RequestQueue(requests, len(self._pool.replicas), sticky=self._sticky)
        else:
            self._book.add(requests)
        batch = GenerationBatch(requests, temperature, len(requests))
        self._batches |= dict.fromkeys((request.key for request in requests), batch)
        return batch

    def collect(self, batch: GenerationBatch) -> Iterator[list[Rollout]]:
        """Wait for requests that were added; yields batches of their rollouts as they finish, each request's once.

        Raises:
            DeadlineError: nothing was finished for too long, and rebuilding did not help.
            ActorLostError: too few replicas are left.
        """
        progress = time.monotonic()
        with track_calls(GENERATE, self._pending):
            while batch.missing or batch.finished:
                if batch.finished:
                    finished, batch.finished = batch.finished, []
                    yield finished
                    continue
                self._pool.poll_rebuilds()
                if self._pool.stale:
                    self._refresh(self._pool.stale)
                self._dispatch()
                for replica in self._next_answers(time.monotonic() - progress):
                    self._answer(replica)
                    progress = time.monotonic()
        for request in batch.requests:
            del self._batches[request.key]

    def meanwhile(self, calls: Mapping[str, Ref[object]], seconds: float) -> None:
        """Keep the replicas busy until one of these calls has an answer, or `seconds` are over.

        The policy may be busy with one of them, so rebuilt replicas get their weights later.
        """
        end, waited = time.monotonic() + seconds, list(calls.values())
        with track_calls(GENERATE, self._pending):
            while not self._book.done and time.monotonic() < end and not ray.wait(waited, timeout=0)[0]:
                self._pool.poll_rebuilds()
                self._dispatch()
                polls = [poll.answer for poll in self._polls.values()]
                ray.wait([*waited, *polls], timeout=min(TICK_SECONDS, max(end - time.monotonic(), 0.0)))
                for replica in self._ready(polls):
                    self._answer(replica)

    def cut(self) -> None:
        """Let unfinished requests begin anew: the replicas drop them, and they are handed out again when somebody waits."""
        serving = {replica.rank: replica for replica in self._pool.serving}
        for rank in [rank for rank in self._book.ranks if rank in serving]:
            self._submits.setdefault(rank, []).append(serving[rank].cancel())
            if rank in self._polls:
                if ray.wait([self._polls[rank].answer], timeout=self._seconds)[0]:
                    self._answer(serving[rank])
                else:
                    self._pool.lost(serving[rank], overrun(GENERATE, [serving[rank].name], self._seconds))
        for rank in self._book.ranks:
            self._drop(rank)

    def reset(self) -> None:
        """Forget all requests, here and on the replicas."""
        self.cut()
        self._book = RequestQueue([], 0, sticky=False)
        self._batches.clear()

    def _drop(self, rank: int) -> None:
        """Take back what a rank owes, and wait for it no longer."""
        if rank in self._polls:
            self._pending.pop(self._polls.pop(rank).name, None)
        self._submits.pop(rank, None)
        self._book.lost(rank)

    def _dispatch(self) -> None:
        book, replicas = self._book, self._pool.replicas
        for rank in {*self._polls, *book.ranks}:
            if rank >= len(replicas) or self._is_gone(rank, replicas[rank]):
                self._drop(rank)
        serving = {replica.rank: replica for replica in self._pool.serving}
        for replica in replicas:
            if replica.health.state == "abandoned":
                book.release(replica.rank)
        for rank, share in book.dispatch(list(serving)).items():
            for temperature, part in groupby(share, key=lambda request: self._batches[request.key].temperature):
                submit = serving[rank].submit(Records(part), temperature, self._max_new_tokens)
                self._submits.setdefault(rank, []).append(submit)
            self._given[rank] = serving[rank].handle
        for rank, replica in serving.items():
            if rank not in self._polls and book.holds(rank):
                answer = replica.poll(MESSAGE_SIZE, self._poll_seconds)
                self._polls[rank] = _Poll(answer, replica.handle, replica.name)
                self._pending[replica.name] = time.monotonic()

    def _is_gone(self, rank: int, replica: RolloutReplica) -> bool:
        """Whether the process that was given work is there no more; it may have been lost when nobody waited for it."""
        return replica.handle is not self._given[rank] or replica.health.state in ("down", "abandoned")

    def _next_answers(self, idle: float) -> list[RolloutReplica]:
        """All replicas with an answer, once there is one; none where a rebuild needs attention first, or nothing happened."""
        waited = [*(poll.answer for poll in self._polls.values()), *self._pool.building.values()]
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
        """Replicas whose poll has an answer."""
        if not waited:
            return []
        # A thousand replicas answer in bursts: one look at all of them costs no more than at one.
        ready = set(ray.wait(list(waited), num_returns=len(waited), timeout=0)[0])
        return [self._pool.replicas[rank] for rank, poll in self._polls.items() if poll.answer in ready]

    def _answer(self, replica: RolloutReplica) -> None:
        """Take a replica's answer and keep what it finished; if it was lost, its open requests go back to the book."""
        poll, submits = self._polls.pop(replica.rank), self._submits.pop(replica.rank, [])
        self._pending.pop(replica.name, None)
        try:
            for submit in submits:
                fetch(submit, GENERATE, replica.name)
            finished, _ = fetch(poll.answer, GENERATE, replica.name)
        except ActorLostError as error:
            if poll.handle is replica.handle:
                self._pool.lost(replica, error)
            self._book.lost(replica.rank)
            return
        for rollout in self._book.finished(finished):
            batch = self._batches[rollout.key]
            batch.missing -= 1
            batch.finished.append(rollout)
