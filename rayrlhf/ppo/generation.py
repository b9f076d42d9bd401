"""Sampling responses on the rollout replicas, streamed back as they finish.

Requests go out in one message a replica and come back in batches, because a Ray call per sample would cost more than the
sample's tokens on a small model. All samples of one prompt go to the same replica, where they share its prefix cache. A
replica that is lost meanwhile costs time and nothing else: its open requests are sampled again, with the same seeds.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ray

from rayrlhf.actors.asked import asked
from rayrlhf.actors.replicas import Replica, ReplicaPool
from rayrlhf.actors.waiting import fetch, overrun
from rayrlhf.data.records import Prompt, Records, Rollout, RolloutRequest, SampleKey
from rayrlhf.data.seeds import sample_seed
from rayrlhf.errors import ActorLostError
from rayrlhf.ppo.requeue import WorkBook

GENERATE = "generate"
MESSAGE_SIZE = 32
"""Fewest finished rollouts worth one Ray message."""
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
            requests.append(RolloutRequest(SampleKey(step, prompt.id, sample), prompt.token_ids, seed))
    return requests


class _Poll(NamedTuple):
    """A pending `poll`, and the process it was sent to: the replica may have another one since."""

    answer: ray.ObjectRef
    handle: Any


class Generation:
    """One call's way through the replicas.

    Args:
        pool: the replicas.
        refresh: gives the current weights to rebuilt replicas, which then count as serving.
        temperature: 0 is greedy.
        max_new_tokens: longest response.
        seconds: longest time in which no replica finishes anything.
        sticky: see `WorkBook`.
    """

    def __init__(
        self,
        pool: ReplicaPool,
        refresh: Callable[[Sequence[Replica]], None],
        temperature: float,
        max_new_tokens: int,
        seconds: float,
        *,
        sticky: bool = False,
    ) -> None:
        self._pool = pool
        self._refresh = refresh
        self._sampling = (temperature, max_new_tokens)
        self._seconds = seconds
        self._sticky = sticky
        self._polls: dict[int, _Poll] = {}
        self._submits: dict[int, list[ray.ObjectRef]] = {}
        self._asked: dict[str, float] = {}

    def run(self, requests: Sequence[RolloutRequest]) -> Iterator[list[Rollout]]:
        """Sample all requests; yields batches of finished rollouts in the order they finish, each request's once.

        Raises:
            DeadlineError: nothing was finished for too long, and rebuilding did not help.
            ActorLostError: too few replicas are left.
        """
        book = WorkBook(requests, len(self._pool.replicas), sticky=self._sticky)
        progress = time.monotonic()
        with asked(GENERATE, self._asked):
            while not book.done:
                self._pool.tend()
                if self._pool.stale:
                    self._refresh(self._pool.stale)
                self._hand_out(book)
                finished: list[Rollout] = []
                for replica in self._next_answers(time.monotonic() - progress):
                    finished += self._answer(replica, book)
                    progress = time.monotonic()
                if finished:
                    yield finished

    def _hand_out(self, book: WorkBook) -> None:
        serving = {replica.rank: replica for replica in self._pool.serving}
        for replica in self._pool.replicas:
            if replica.health.state == "abandoned":
                book.release(replica.rank)
        for rank, share in book.hand_out(list(serving)).items():
            self._submits.setdefault(rank, []).append(serving[rank].handle.submit.remote(Records(share), *self._sampling))
        for rank, replica in serving.items():
            if rank not in self._polls and book.holds(rank):
                self._polls[rank] = _Poll(replica.handle.poll.remote(MESSAGE_SIZE), replica.handle)
                self._asked[replica.name] = time.monotonic()

    def _next_answers(self, idle: float) -> list[Replica]:
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
        # A thousand replicas answer in bursts: one look at all of them costs no more than at one.
        ready = set(ray.wait(waited, num_returns=len(waited), timeout=0)[0])
        return [self._pool.replicas[rank] for rank, poll in self._polls.items() if poll.answer in ready]

    def _answer(self, replica: Replica, book: WorkBook) -> list[Rollout]:
        """Take a replica's answer; if it was lost, its open requests go back to the book."""
        poll, submits = self._polls.pop(replica.rank), self._submits.pop(replica.rank, [])
        self._asked.pop(replica.name, None)
        try:
            for submit in submits:
                fetch(submit, GENERATE, replica.name)
            finished, _ = fetch(poll.answer, GENERATE, replica.name)
        except ActorLostError as error:
            if poll.handle is replica.handle:
                self._pool.lost(replica, error)
            book.lost(replica.rank)
            return []
        return book.finished(finished)
