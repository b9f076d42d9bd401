"""Reading finished rollouts with every model that has an opinion: reward, reference, critic, and the policy itself.

`Scorer.add` takes rollouts as they finish. Where roles have devices of their own their calls start at once, while other
rollouts are still being generated; where roles share cores they take turns at the end, each with all cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray

from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.waiting import wait_all
from rayrlhf.data.batching import balance
from rayrlhf.data.records import Rollout, TokenScores
from rayrlhf.engines.interfaces import Want
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.rewards.score import RewardBatch


class Reading(NamedTuple):
    """One model's reading of a step: who reads, what is wanted, and whether adapters are off."""

    name: str
    group: ActorGroup
    want: frozenset[Want]
    temperature: float = 1.0
    reference: bool = False


@dataclass(frozen=True, slots=True)
class ScoredRollouts:
    """Rollouts of a step in the order of their keys, with everything the models said of them.

    Attributes:
        rollouts: [B].
        rewards: scores and their parts, [B].
        readings: reading name -> TokenScores of each rollout.
    """

    rollouts: tuple[Rollout, ...]
    rewards: RewardBatch
    readings: dict[str, list[TokenScores]]


@dataclass
class Scorer:
    """Collects rollouts and scores them, concurrently or in turns."""

    reward: ActorGroup
    readings: Sequence[Reading]
    prompts: dict[int, Any]
    overlap: bool
    seconds: float
    timer: PhaseTimer
    _rollouts: list[Rollout] = field(default_factory=list)
    _calls: dict[str, list[tuple[list[Rollout], dict[str, ray.ObjectRef], list[list[int]]]]] = field(default_factory=dict)

    def add(self, finished: Sequence[Rollout]) -> None:
        """Take finished rollouts; starts their scoring at once where roles overlap."""
        self._rollouts.extend(finished)
        if self.overlap:
            for name in ["reward", *(reading.name for reading in self.readings)]:
                self._start(name, list(finished))

    def finish(self) -> ScoredRollouts:
        """Wait for every score; the result does not depend on the order in which rollouts finished."""
        ordered = sorted(self._rollouts, key=lambda rollout: rollout.key)
        collected: dict[str, dict[Any, Any]] = {}
        for name in ["reward", *(reading.name for reading in self.readings)]:
            with self.timer.phase(name):
                if not self.overlap:
                    self._start(name, ordered)
                collected[name] = self._collect(name)
        return ScoredRollouts(
            tuple(ordered),
            RewardBatch.gather([collected["reward"][rollout.key] for rollout in ordered]),
            {r.name: [collected[r.name][rollout.key] for rollout in ordered] for r in self.readings},
        )

    def _start(self, name: str, rollouts: list[Rollout]) -> None:
        """Split rollouts over the ranks of one role by tokens and call each."""
        reading = next((reading for reading in self.readings if reading.name == name), None)
        group = reading.group if reading else self.reward
        shares = balance([len(r.prompt_ids) + len(r.response_ids) for r in rollouts], len(group))
        if reading:
            arguments: list[tuple[Any, ...]] = [
                ([rollouts[i].sequence() for i in share], reading.want, reading.temperature, reading.reference)
                for share in shares
            ]
        else:
            arguments = [([self.prompts[rollouts[i].key.prompt] for i in share], [rollouts[i] for i in share]) for share in shares]
        calls = group.call_each("score", arguments)
        self._calls.setdefault(name, []).append((rollouts, calls, shares))

    def _collect(self, name: str) -> dict[Any, Any]:
        """Wait for all calls of one reading; returns sample key -> what was said of it."""
        answers: dict[Any, Any] = {}
        for rollouts, calls, shares in self._calls.get(name, []):
            for share, part in zip(shares, wait_all(calls, name, self.seconds), strict=True):
                rows = part.rows() if isinstance(part, RewardBatch) else part
                for index, row in zip(share, rows, strict=True):
                    answers[rollouts[index].key] = row
        return answers
