"""Discrete-event simulation of a PPO run, to estimate step times.

It predicts the effect of more replicas, staleness or failures. A replica generates a limited number of responses at a time;
each takes its length times the time per token. Responses of step b may start once weight version b - max_staleness exists,
which bounds their staleness when step b trains on them: the same rule as `async.max_staleness` (`rayrlhf.ppo.step_pipeline`).
The trainer takes the steps in order: it waits for the last response, scores, updates, and syncs, which pauses all replicas. A
replica that dies loses its responses in progress; they start again, and the replica returns later.

The report is a pure function of configuration and seed. Only the order of events is modeled; other effects, such as slower
sampling on a device shared with training, must be part of the rates.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayrlhf.config.launch import SimulationConfig
from rayrlhf.ppo.step_pipeline import capacity


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """Results of a simulated run, over the steps after the first.

    Attributes:
        step_seconds: mean time between the ends of steps.
        trainer_idle: share of the time in which the trainer waited for responses, in [0, 1].
        replica_idle: idle share of the replicas' slots.
        samples_per_hour: responses trained on.
        staleness: mean staleness of a response when trained on, in weight versions.
        oldest: maximum staleness.
        lost: responses that were restarted.
    """

    step_seconds: float
    trainer_idle: float
    replica_idle: float
    samples_per_hour: float
    staleness: float
    oldest: int
    lost: int
    failures: int

    def lines(self) -> list[str]:
        """Return the report as text."""
        return [
            f"step: {self.step_seconds:.1f} s, {self.samples_per_hour:,.0f} responses per hour",
            f"idle: trainer {self.trainer_idle:.0%}, slots on replicas {self.replica_idle:.0%}",
            f"staleness: {self.staleness:.2f} versions on average, {self.oldest} at most",
            f"failures: {self.failures} replicas, {self.lost} responses sampled again",
        ]


def simulate(config: SimulationConfig, *, samples: int, replicas: int, places: int, longest: int) -> SimulationReport:
    """Simulate a run.

    Args:
        samples: responses of a step.
        places: slots of a replica, for responses generated at the same time.
        longest: maximum tokens of a response.
    """
    return _Simulation(config, samples, replicas, places, longest).run()


@dataclass
class _Response:
    step: int
    length: int
    version: int = 0


class _Event(NamedTuple):
    """An event; `birth` orders events of the same time."""

    time: float
    birth: int
    handler: Callable[[int, int], None]
    rank: int
    key: int


@dataclass
class _Replica:
    held: dict[int, _Response] = field(default_factory=dict)
    alive: bool = True


class _Simulation:
    """State of the simulation, advanced by events in time order."""

    def __init__(self, config: SimulationConfig, samples: int, replicas: int, places: int, longest: int) -> None:
        self._config, self._samples, self._places, self._longest = config, samples, places, longest
        self._random = np.random.default_rng(config.seed)
        self._replicas = [_Replica() for _ in range(replicas)]
        self._events: list[_Event] = []
        self._born = 0
        self._now = self._paused_until = self._busy_places = 0.0
        self._held = 0
        self._waiting: deque[_Response] = deque()
        self._open: dict[int, int] = {}
        self._tokens: dict[int, int] = {}
        self._ages: dict[int, int] = {}
        self._oldest: dict[int, int] = {}
        self._issued = self._version = 0
        self._training = False
        self._ends: list[float] = []
        self._idle_since = self._idle = 0.0
        self._first: tuple[float, float, float] = (0.0, 0.0, 0.0)
        self._lost = self._failures = 0

    def run(self) -> SimulationReport:
        """Handle events until the last step is complete."""
        for rank in range(len(self._replicas)):
            self._schedule_failure(rank)
        self._admit()
        while len(self._ends) < self._config.steps:
            event = heapq.heappop(self._events)
            self._busy_places += self._held * (event.time - self._now)
            self._now = event.time
            event.handler(event.rank, event.key)
        return self._report()

    def _on_finished(self, rank: int, key: int) -> None:
        response = self._replicas[rank].held.pop(key, None)
        if response is None:  # its replica died
            return
        self._held -= 1
        step = response.step
        self._open[step] -= 1
        self._ages[step] += step - response.version
        self._oldest[step] = max(self._oldest[step], step - response.version)
        if self._waiting and self._now >= self._paused_until:
            self._start(rank)
        self._train()

    def _on_trained(self, _rank: int, _key: int) -> None:
        """Complete the update; the sync pauses all replicas."""
        pause = self._config.rates.sync_seconds
        self._paused_until = self._now + pause
        sampling = self._on_finished
        self._events = [
            event._replace(time=event.time + pause) if event.handler == sampling else event for event in self._events
        ]
        heapq.heapify(self._events)
        self._put(pause, self._on_synced)

    def _on_synced(self, _rank: int, _key: int) -> None:
        self._version += 1
        self._training = False
        self._ends.append(self._now)
        self._idle_since = self._now
        if len(self._ends) == 1:
            self._first = (self._now, self._idle, self._busy_places)
        self._admit()
        self._train()

    def _on_failed(self, rank: int, _key: int) -> None:
        replica = self._replicas[rank]
        self._failures += 1
        self._lost += len(replica.held)
        self._held -= len(replica.held)
        self._waiting.extendleft(replica.held.values())
        replica.held, replica.alive = {}, False
        self._put(self._config.failures.rebuild_seconds, self._on_rebuilt, rank)
        self._fill()

    def _on_rebuilt(self, rank: int, _key: int) -> None:
        self._replicas[rank].alive = True
        self._schedule_failure(rank)
        self._fill()

    def _admit(self) -> None:
        """Admit responses of further steps within the staleness bound."""
        size, steps, staleness = self._samples, self._config.steps, self._config.max_staleness or 0
        done = min(self._version, steps - 1)  # no new responses after the last step
        for _ in range(capacity(done, self._issued * size, size, staleness, steps) // size):
            step, lengths = self._issued, self._draw()
            self._waiting.extend(_Response(step, int(length)) for length in lengths)
            self._open[step], self._tokens[step] = self._samples, int(lengths.sum())
            self._ages[step] = self._oldest[step] = 0
            self._issued += 1
        self._fill()

    def _draw(self) -> NDArray[np.float64]:
        lengths = self._config.lengths
        drawn = np.exp(self._random.normal(np.log(lengths.median), lengths.spread, self._samples))
        cut: NDArray[np.float64] = np.clip(np.rint(drawn), 1, self._longest)
        return cut

    def _fill(self) -> None:
        """Assign waiting responses to the least loaded replicas."""
        if not self._waiting or self._now < self._paused_until:
            return
        room = [(len(replica.held), rank) for rank, replica in enumerate(self._replicas) if replica.alive]
        heapq.heapify(room)
        while self._waiting and room and room[0][0] < self._places:
            held, rank = room[0]
            heapq.heapreplace(room, (held + 1, rank))
            self._start(rank)

    def _start(self, rank: int) -> None:
        response = self._waiting.popleft()
        response.version = self._version
        self._held += 1
        key = self._born  # a restarted response gets a new key, so that its old end event is ignored
        self._replicas[rank].held[key] = response
        self._put(response.length * self._config.rates.token_seconds, self._on_finished, rank, key)

    def _train(self) -> None:
        """Start the next step's scoring and update once all its responses are complete."""
        step = len(self._ends)
        if self._training or step >= self._config.steps or self._open.get(step, 1):
            return
        self._training = True
        self._idle += self._now - self._idle_since
        rates = self._config.rates
        tokens = self._tokens[step] + self._samples * rates.prompt_tokens
        self._put(tokens / rates.score_tokens + tokens / rates.update_tokens, self._on_trained)

    def _schedule_failure(self, rank: int) -> None:
        hours = self._config.failures.hours_between
        if hours is not None:
            self._put(float(self._random.exponential(hours * 3600)), self._on_failed, rank)

    def _put(self, delay: float, handler: Callable[[int, int], None], rank: int = 0, key: int = 0) -> None:
        self._born += 1
        heapq.heappush(self._events, _Event(self._now + delay, self._born, handler, rank, key))

    def _report(self) -> SimulationReport:
        start, idle, busy = self._first
        seconds, steps = self._ends[-1] - start, self._config.steps - 1
        counted = range(1, self._config.steps)
        places = len(self._replicas) * self._places
        return SimulationReport(
            seconds / steps,
            (self._idle - idle) / seconds,
            1 - (self._busy_places - busy) / (seconds * places),
            self._samples * steps / seconds * 3600,
            sum(self._ages[step] for step in counted) / (self._samples * steps),
            max(self._oldest[step] for step in counted),
            self._lost,
            self._failures,
        )
