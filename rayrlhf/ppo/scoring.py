"""Scores finished rollouts with the reward, the reference, the critic and the policy itself.

`Scorer.add` takes rollouts as they finish. Where roles have devices of their own, their calls start at once, while other
rollouts are still being generated. Where roles share cores, they take turns at the end, each with all cores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.actor_restarter import ActorRestarter
from rayrlhf.actors.placement import ForwardRole
from rayrlhf.actors.remote import Handle, Ref
from rayrlhf.actors.worker import Worker
from rayrlhf.data.batching import balance
from rayrlhf.data.records import Float32, Prompt, Records, Rollout, SampleKey, TokenScores, TokenSequence
from rayrlhf.errors import ActorLostError, DeadlineError, UserError
from rayrlhf.models.network import OutputName
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.rewards.returned_values import checked_values, length_of, token_rewards
from rayrlhf.rewards.score import RewardBatch

REWARD: Literal["reward"] = "reward"
OWN_REWARD = "loop"
"""Name of the reward part that a loop passes to `PPOTrainer.step`."""
_OWN = "rewards of the loop"
OwnRewards = Sequence[float] | Sequence[Sequence[float]] | Sequence[Float32] | Float32
"""Rewards of B rollouts: a number each [B], or one per response token of each, B rows of [R]."""
ScoringRole = Literal[ForwardRole, "reward"]
Result = TypeVar("Result")


class ForwardPass(NamedTuple):
    """One model's forward pass over the rollouts of a step.

    Attributes:
        name: key of the result.
        role: the actors that run it.
        temperature: of the distribution log-probs are taken from.
        reference: adapters off.
        replicate: every rank reads all rollouts (ZeRO-3 ranks must run equally many forwards); else they split them.
        group: number of consecutive ranks that read the same rollouts, because they share rows.
    """

    name: str
    role: ForwardRole
    outputs: frozenset[OutputName]
    temperature: float = 1.0
    reference: bool = False
    replicate: bool = False
    group: int = 1


class RewardRow(NamedTuple):
    """A response's score, its parts, and the share of single tokens (see `RewardBatch`)."""

    score: float
    parts: dict[str, float]
    tokens: Float32 | None = None


@dataclass(frozen=True, slots=True)
class ScoredRollouts:
    """Rollouts of a step, ordered by key, with rewards and the models' outputs.

    Attributes:
        rollouts: [B].
        rewards: scores and their parts, [B]; NaN where the configuration has no reward.
        forward_passes: name (`policy`, `reference`, `critic`) -> TokenScores of each rollout.
        prompts: prompt id -> prompt, for all prompts of the step.
        greedy: one greedy response to each prompt, with rewards alone; None where no estimator compares with it.
    """

    rollouts: tuple[Rollout, ...]
    rewards: RewardBatch
    forward_passes: Mapping[str, list[TokenScores]]
    prompts: Mapping[int, Prompt]
    greedy: "ScoredRollouts | None" = None

    def with_rewards(self, rewards: OwnRewards) -> "ScoredRollouts":
        """Replace the rewards, also those that an environment paid per turn.

        The parts of the configured reward stay as metrics.

        Args:
            rewards: for the rollouts in their order. Rewards per token are counted at their tokens, and their sum is the score.

        Raises:
            UserError: a wrong number of values, one that is not finite, or a reward on a token that the policy did not sample.
        """
        values: Any = rewards
        tokens = None
        if length_of(values) == len(self.rollouts) and any(length_of(row) is not None for row in values):
            tokens = token_rewards(_OWN, values, self.rollouts, "token")
            values = [None if row is None else row.sum(dtype=np.float64) for row in tokens]
        scores = checked_values(_OWN, values, len(self.rollouts))
        if np.isnan(scores).any():
            raise UserError(f"rewards: none for rollout {int(np.flatnonzero(np.isnan(scores))[0])}; expected a number")
        own = RewardBatch(scores, {**self.rewards.parts, OWN_REWARD: scores}, tokens)
        return replace(self, rollouts=tuple(replace(rollout, rewards=None) for rollout in self.rollouts), rewards=own)

    def reward_rows(self) -> dict[SampleKey, RewardRow]:
        """Return the reward of each response by its key."""
        return dict(zip((rollout.key for rollout in self.rollouts), _rows(self.rewards), strict=True))


class _Call(NamedTuple, Generic[Result]):
    """A pending call to one rank; `send` repeats it for the same rollouts."""

    role: ScoringRole
    rank: int
    handle: Handle[Worker]
    result: Ref[Result]
    send: Callable[[], Ref[Result]]
    keys: list[SampleKey]


@dataclass
class Scorer:
    """Collects rollouts and scores them, concurrently or in turns.

    Attributes:
        actor_groups: the actors; without a reward role the scores are NaN.
        restarter: replaces lost reward and reference actors, whose calls are then repeated.
        forward_passes: the models that read the rollouts.
        prompts: prompt id -> prompt, for the reward functions' columns.
        overlap: start calls as rollouts arrive.
        seconds: deadline of each wait.
        timer: counts each forward pass and the reward as a phase.
        known_rewards: rewards that are known already; the reward actors are not called then.
        meanwhile: called with pending calls and the longest wait for them.
    """

    actor_groups: ActorGroups
    restarter: ActorRestarter
    forward_passes: Sequence[ForwardPass]
    prompts: Mapping[int, Prompt]
    overlap: bool
    seconds: float
    timer: PhaseTimer
    known_rewards: Mapping[SampleKey, RewardRow] | None = None
    meanwhile: Callable[[Mapping[str, Ref[object]], float], None] = lambda *_: None
    _rollouts: list[Rollout] = field(default_factory=list)
    _reward_calls: list[_Call[RewardBatch]] = field(default_factory=list)
    _forward_calls: dict[str, list[_Call[list[TokenScores]]]] = field(default_factory=dict)

    def add(self, finished: Sequence[Rollout]) -> None:
        """Take finished rollouts; starts their scoring at once where roles overlap."""
        finished = [as_trained(rollout, self.prompts[rollout.key.prompt]) for rollout in finished]
        self._rollouts.extend(finished)
        if self.overlap:
            if self.known_rewards is None:
                self._start_reward(finished)
            for forward_pass in self.forward_passes:
                self._start_forward_pass(forward_pass, finished)

    def finish(self) -> ScoredRollouts:
        """Wait for all scores; their order does not depend on the rollouts' timing."""
        ordered = sorted(self._rollouts, key=lambda rollout: rollout.key)
        rewards = self.known_rewards or self._rewards(ordered)
        forward_passes = {}
        for forward_pass in self.forward_passes:
            with self.timer.phase(forward_pass.name):
                if not self.overlap:
                    self._start_forward_pass(forward_pass, ordered)
                scores = self._collect_scores(forward_pass.name)
            forward_passes[forward_pass.name] = [scores[rollout.key] for rollout in ordered]
        merged = _merged([rewards[rollout.key] for rollout in ordered])
        return ScoredRollouts(tuple(ordered), merged, forward_passes, self.prompts)

    def _rewards(self, ordered: Sequence[Rollout]) -> Mapping[SampleKey, RewardRow]:
        if REWARD not in self.actor_groups:
            return {rollout.key: RewardRow(float("nan"), {}) for rollout in ordered}
        with self.timer.phase(REWARD):
            if not self.overlap:
                self._start_reward(ordered)
            return {
                key: row
                for call in self._reward_calls
                for key, row in zip(call.keys, _rows(self._result(call, REWARD)), strict=True)
            }

    def _start_reward(self, rollouts: Sequence[Rollout]) -> None:
        if REWARD not in self.actor_groups:
            return
        for rank, share in enumerate(_shares(rollouts, len(self.actor_groups[REWARD]))):
            prompts = Records(self.prompts[rollout.key.prompt] for rollout in share)
            send = partial(self._send_reward, rank, prompts, Records(share))
            self._reward_calls.append(self._call(REWARD, rank, send, share))

    def _send_reward(self, rank: int, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Ref[RewardBatch]:
        return self.actor_groups[REWARD].score(rank, prompts, rollouts)

    def _start_forward_pass(self, forward_pass: ForwardPass, rollouts: Sequence[Rollout]) -> None:
        ranks = len(self.actor_groups[forward_pass.role])
        size = forward_pass.group
        shares = [list(rollouts)] * ranks if forward_pass.replicate else _shares(rollouts, ranks // size)
        calls = self._forward_calls.setdefault(forward_pass.name, [])
        for rank in range(ranks):
            share = shares[rank if forward_pass.replicate else rank // size]
            send = partial(self._send_forward_pass, forward_pass, rank, Records(rollout.sequence() for rollout in share))
            calls.append(self._call(forward_pass.role, rank, send, share))

    def _send_forward_pass(
        self, forward_pass: ForwardPass, rank: int, sequences: Sequence[TokenSequence]
    ) -> Ref[list[TokenScores]]:
        group = self.actor_groups[forward_pass.role]
        return group.score(rank, sequences, forward_pass.outputs, forward_pass.temperature, forward_pass.reference)

    def _call(self, role: ScoringRole, rank: int, send: Callable[[], Ref[Result]], share: Sequence[Rollout]) -> _Call[Result]:
        handle = self.actor_groups[role].handles[rank]
        return _Call(role, rank, handle, send(), send, [rollout.key for rollout in share])

    def _collect_scores(self, name: str) -> dict[SampleKey, TokenScores]:
        """Wait for all calls of a forward pass; returns the scores of each rollout."""
        found: dict[SampleKey, TokenScores] = {}
        for call in self._forward_calls.get(name, []):
            scores = self._result(call, name)
            found |= zip(call.keys, scores, strict=True)
        return found

    def _result(self, call: _Call[Result], what: str) -> Result:
        """Wait for one call; replace a lost process without training state and repeat the call."""
        group = self.actor_groups[call.role]
        try:
            pending = {group.names[call.rank]: call.result}
            self.meanwhile(pending, self.seconds)
            return group.wait(pending, what, self.seconds)[0]
        except (ActorLostError, DeadlineError) as error:
            if call.role == "policy" or call.role == "critic":
                raise
            # A process that answers pings but not this call (a reward function that hangs) counts as lost.
            lost = error if isinstance(error, ActorLostError) else ActorLostError(str(error), group.names[call.rank])
            handle = self.restarter.restart_lost(call.role, call.rank, call.handle, lost)
        return self._result(call._replace(handle=handle, result=call.send()), what)


def as_trained(rollout: Rollout, prompt: Prompt) -> Rollout:
    """Return a rollout with the prompt that is trained on, without demonstrations."""
    return rollout if prompt.context_ids is None else replace(rollout, prompt_ids=prompt.token_ids)


def _shares(rollouts: Sequence[Rollout], ranks: int) -> list[list[Rollout]]:
    """Split rollouts over ranks by tokens."""
    lengths = [len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts]
    return [[rollouts[index] for index in part] for part in balance(lengths, ranks)]


def _rows(batch: RewardBatch) -> list[RewardRow]:
    return [
        RewardRow(
            float(score),
            {name: float(values[index]) for name, values in batch.parts.items()},
            None if batch.tokens is None else batch.tokens[index],
        )
        for index, score in enumerate(batch.scores)
    ]


def _merged(rows: Sequence[RewardRow]) -> RewardBatch:
    names = rows[0].parts if rows else {}
    return RewardBatch(
        np.array([row.score for row in rows], dtype=np.float32),
        {name: np.array([row.parts[name] for row in rows], dtype=np.float32) for name in names},
        [row.tokens for row in rows] if any(row.tokens is not None for row in rows) else None,
    )
