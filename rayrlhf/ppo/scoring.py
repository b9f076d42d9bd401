"""Reading finished rollouts with every model that has an opinion: reward, reference, critic, and the policy itself.

`Scorer.add` takes rollouts as they finish. Where roles have devices of their own their calls start at once, while other
rollouts are still being generated; where roles share cores they take turns at the end, each with all cores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import ray

from rayrlhf.actors.group import ActorGroup
from rayrlhf.actors.waiting import wait_all
from rayrlhf.data.batching import balance
from rayrlhf.data.records import Prompt, Rollout, SampleKey, TokenScores
from rayrlhf.engines.interfaces import Want
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.rewards.score import RewardBatch

REWARD = "reward"


class Reading(NamedTuple):
    """One model's reading of a step.

    Attributes:
        name: key of the result.
        group: the actors that read.
        want: what they compute.
        temperature: of the distribution log-probs are taken from.
        reference: adapters off.
        replicate: every rank reads everything (ZeRO-3 ranks must make equally many forwards), else they share out.
    """

    name: str
    group: ActorGroup
    want: frozenset[Want]
    temperature: float = 1.0
    reference: bool = False
    replicate: bool = False


@dataclass(frozen=True, slots=True)
class ScoredRollouts:
    """Rollouts of a step in the order of their keys, with everything the models said of them.

    Attributes:
        rollouts: [B].
        rewards: scores and their parts, [B].
        readings: reading name -> TokenScores of each rollout.
        prompts: prompt id -> prompt, for all prompts of the step.
    """

    rollouts: tuple[Rollout, ...]
    rewards: RewardBatch
    readings: Mapping[str, list[TokenScores]]
    prompts: Mapping[int, Prompt]


class _Call(NamedTuple):
    """Pending answers of one role's ranks, and which rollouts each answer is about."""

    pending: Mapping[str, ray.ObjectRef]
    keys: list[list[SampleKey]]


@dataclass
class Scorer:
    """Collects rollouts and scores them, concurrently or in turns.

    Attributes:
        reward: the reward actors.
        readings: the models that read.
        prompts: prompt id -> prompt, for the reward functions' columns.
        overlap: start calls as rollouts arrive.
        seconds: deadline of each wait.
        timer: counts each reading as a phase.
    """

    reward: ActorGroup
    readings: Sequence[Reading]
    prompts: Mapping[int, Prompt]
    overlap: bool
    seconds: float
    timer: PhaseTimer
    _rollouts: list[Rollout] = field(default_factory=list)
    _calls: dict[str, list[_Call]] = field(default_factory=dict)

    def add(self, finished: Sequence[Rollout]) -> None:
        """Take finished rollouts; starts their scoring at once where roles overlap."""
        self._rollouts.extend(finished)
        if self.overlap:
            self._start_reward(finished)
            for reading in self.readings:
                self._start_reading(reading, finished)

    def finish(self) -> ScoredRollouts:
        """Wait for every score; the result does not depend on the order in which rollouts finished."""
        ordered = sorted(self._rollouts, key=lambda rollout: rollout.key)
        with self.timer.phase(REWARD):
            if not self.overlap:
                self._start_reward(ordered)
            rewards = self._collect(REWARD)
        readings = {}
        for reading in self.readings:
            with self.timer.phase(reading.name):
                if not self.overlap:
                    self._start_reading(reading, ordered)
                scores = self._collect(reading.name)
            readings[reading.name] = [scores[rollout.key] for rollout in ordered]
        merged = _merged([rewards[rollout.key] for rollout in ordered])
        return ScoredRollouts(tuple(ordered), merged, readings, self.prompts)

    def _start_reward(self, rollouts: Sequence[Rollout]) -> None:
        shares = _shares(rollouts, len(self.reward))
        arguments = [([self.prompts[rollout.key.prompt] for rollout in share], share) for share in shares]
        self._remember(REWARD, self.reward.call_each("score", arguments), shares)

    def _start_reading(self, reading: Reading, rollouts: Sequence[Rollout]) -> None:
        ranks = len(reading.group)
        shares = [list(rollouts)] * ranks if reading.replicate else _shares(rollouts, ranks)
        arguments: list[tuple[Any, ...]] = [
            ([rollout.sequence() for rollout in share], reading.want, reading.temperature, reading.reference)
            for share in shares
        ]
        self._remember(reading.name, reading.group.call_each("score", arguments), shares)

    def _remember(self, name: str, pending: Mapping[str, ray.ObjectRef], shares: Sequence[Sequence[Rollout]]) -> None:
        self._calls.setdefault(name, []).append(_Call(pending, [[rollout.key for rollout in share] for share in shares]))

    def _collect(self, name: str) -> dict[SampleKey, Any]:
        """Wait for all calls of one role; returns what was said of each rollout."""
        answers: dict[SampleKey, Any] = {}
        for call in self._calls.get(name, []):
            for keys, part in zip(call.keys, wait_all(call.pending, name, self.seconds), strict=True):
                rows = _rows(part) if isinstance(part, RewardBatch) else part
                answers |= dict(zip(keys, rows, strict=True))
        return answers


def _shares(rollouts: Sequence[Rollout], ranks: int) -> list[list[Rollout]]:
    """Split rollouts over ranks by tokens."""
    lengths = [len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts]
    return [[rollouts[index] for index in part] for part in balance(lengths, ranks)]


class _RewardRow(NamedTuple):
    score: float
    parts: dict[str, float]


def _rows(batch: RewardBatch) -> list[_RewardRow]:
    return [
        _RewardRow(float(score), {name: float(values[index]) for name, values in batch.parts.items()})
        for index, score in enumerate(batch.scores)
    ]


def _merged(rows: Sequence[_RewardRow]) -> RewardBatch:
    names = rows[0].parts if rows else {}
    return RewardBatch(
        np.array([row.score for row in rows], dtype=np.float32),
        {name: np.array([row.parts[name] for row in rows], dtype=np.float32) for name in names},
    )
