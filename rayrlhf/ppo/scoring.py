"""Scores finished rollouts with reward, judge, reference, teacher, critic and policy.

`Scorer.add` takes rollouts as they finish. Where roles have devices of their own, their calls start at once, while other
rollouts are still being generated. Where roles share cores, they take turns at the end, each with all cores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from rayrlhf.actors.actor_groups import ActorGroups
from rayrlhf.actors.actor_restarter import ActorRestarter
from rayrlhf.actors.placement import ForwardRole, RewardRole
from rayrlhf.actors.remote import Handle, Ref
from rayrlhf.actors.worker import Worker
from rayrlhf.data.batching import balance
from rayrlhf.data.prefix_tree import in_prefix_order
from rayrlhf.data.records import Float32, Prompt, Records, Rollout, SampleKey, TokenScores, TokenSequence
from rayrlhf.errors import ActorLostError, DeadlineError, UserError
from rayrlhf.models.network_io import OutputName
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.ppo.reward_rows import RewardRow, add_judgments, merged_rows, reward_rows
from rayrlhf.rewards.returned_values import checked_values, length_of, token_rewards
from rayrlhf.rewards.score import RewardBatch

REWARD: Literal["reward"] = "reward"
JUDGE: Literal["judge"] = "judge"
OWN_REWARD = "loop"
"""Name of the reward part that a loop passes to `PPOTrainer.step`."""
_OWN = "rewards of the loop"
OwnRewards = Sequence[float] | Sequence[Sequence[float]] | Sequence[Float32] | Float32
"""Rewards of B rollouts: a number each [B], or one per response token of each, B rows of [R]."""
ScoringRole = Literal[ForwardRole, RewardRole]
Result = TypeVar("Result")


class ForwardPass(NamedTuple):
    """One model's forward pass over the rollouts of a step.

    Attributes:
        name: key of the result.
        role: the actors that run it.
        temperature: of the distribution log-probs are taken from.
        reference: adapters off.
        replicate: every rank reads all rollouts (ranks of ZeRO-3, or that share experts, must run equally many forwards); else
            they split them.
        group: number of consecutive ranks that read the same rollouts, because they share rows or weights.
        shares_prefixes: the role computes common beginnings once.
    """

    name: str
    role: ForwardRole
    outputs: frozenset[OutputName]
    temperature: float = 1.0
    reference: bool = False
    replicate: bool = False
    group: int = 1
    shares_prefixes: bool = False


@dataclass(frozen=True, slots=True)
class ScoredRollouts:
    """Rollouts of a step, ordered by key, with rewards and the models' outputs.

    Attributes:
        rollouts: [B].
        rewards: scores and their parts, [B]; NaN where the configuration has no reward.
        forward_passes: name (`policy`, `reference`, `teacher`, `critic`) -> TokenScores of each rollout.
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

    def table(self, name: str, field: str, width: int) -> Tensor:
        """Return one field of a forward pass, [B, width] or [B, width, K]."""
        return padded_rows([getattr(row, field) for row in self.forward_passes[name]], width)

    def reward_rows(self) -> dict[SampleKey, RewardRow]:
        """Return the reward of each response by its key."""
        return dict(zip((rollout.key for rollout in self.rollouts), reward_rows(self.rewards), strict=True))


def padded_rows(rows: Sequence[np.ndarray], width: int) -> Tensor:
    """Pad or cut rows [R] or [R, K] to a table of `width` columns."""
    padded = np.zeros((len(rows), width, *rows[0].shape[1:]), dtype=rows[0].dtype)
    kept = [row[:width] for row in rows]
    padded[np.arange(width) < np.array([[len(row)] for row in kept])] = np.concatenate(kept)
    return torch.from_numpy(padded)


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
        actor_groups: the actors; without reward and judge the scores are NaN.
        restarter: replaces lost reward, judge and reference actors, whose calls are then repeated.
        forward_passes: the models that read the rollouts.
        prompts: prompt id -> prompt, for the reward functions' columns.
        overlap: start calls as rollouts arrive.
        seconds: deadline of each wait.
        timer: counts each forward pass and the reward as a phase.
        known_rewards: rewards that are known already; the reward actors are not called then.
        meanwhile: called with pending calls and the longest wait for them.
        reward_shares_prefixes: the reward is a model that computes common beginnings once.
        compares: the judge compares the responses to a prompt, so its calls start when all have arrived.
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
    reward_shares_prefixes: bool = False
    compares: bool = False
    _rollouts: list[Rollout] = field(default_factory=list)
    _reward_calls: dict[RewardRole, list[_Call[RewardBatch]]] = field(default_factory=dict)
    _forward_calls: dict[str, list[_Call[list[TokenScores]]]] = field(default_factory=dict)

    def add(self, finished: Sequence[Rollout]) -> None:
        """Take finished rollouts; starts their scoring at once where roles overlap."""
        finished = [as_trained(rollout, self.prompts[rollout.key.prompt]) for rollout in finished]
        self._rollouts.extend(finished)
        if self.overlap:
            if self.known_rewards is None:
                for role in self._reward_roles:
                    if not self._waits(role):
                        self._start_reward(role, finished)
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
        for index, own in enumerate(forward_passes.get("policy", [])):
            if own.experts is not None:  # its updates replay them
                ordered[index] = replace(ordered[index], experts=own.experts)
        merged = merged_rows([rewards[rollout.key] for rollout in ordered])
        return ScoredRollouts(tuple(ordered), merged, forward_passes, self.prompts)

    @property
    def _reward_roles(self) -> list[RewardRole]:
        roles: tuple[RewardRole, ...] = (REWARD, JUDGE)
        return [role for role in roles if role in self.actor_groups]

    def _waits(self, role: RewardRole) -> bool:
        """True if the calls of a role start when all rollouts have arrived."""
        return not self.overlap or (role == JUDGE and self.compares)

    def _rewards(self, ordered: Sequence[Rollout]) -> Mapping[SampleKey, RewardRow]:
        found = {role: self._collect_rewards(role, ordered) for role in self._reward_roles}
        if JUDGE in found:
            return add_judgments(ordered, found[JUDGE], found.get(REWARD))
        return found[REWARD] if found else {rollout.key: RewardRow(float("nan"), {}) for rollout in ordered}

    def _collect_rewards(self, role: RewardRole, ordered: Sequence[Rollout]) -> dict[SampleKey, RewardRow]:
        """Wait for all calls of a role; returns the reward of each rollout."""
        with self.timer.phase(role):
            if self._waits(role):
                self._start_reward(role, ordered)
            return {
                key: row
                for call in self._reward_calls.get(role, [])
                for key, row in zip(call.keys, reward_rows(self._result(call, role)), strict=True)
            }

    def _start_reward(self, role: RewardRole, rollouts: Sequence[Rollout]) -> None:
        ranks, calls = len(self.actor_groups[role]), self._reward_calls.setdefault(role, [])
        if role == JUDGE and self.compares:
            shares = _whole_groups(rollouts, ranks)
        else:
            shares = _shares(rollouts, ranks, shares_prefixes=role == REWARD and self.reward_shares_prefixes)
        for rank, share in enumerate(shares):
            prompts = Records(self.prompts[rollout.key.prompt] for rollout in share)
            send = partial(self._send_reward, role, rank, prompts, Records(share))
            calls.append(self._call(role, rank, send, share))

    def _send_reward(
        self, role: RewardRole, rank: int, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]
    ) -> Ref[RewardBatch]:
        return self.actor_groups[role].score(rank, prompts, rollouts)

    def _start_forward_pass(self, forward_pass: ForwardPass, rollouts: Sequence[Rollout]) -> None:
        ranks = len(self.actor_groups[forward_pass.role])
        size = forward_pass.group
        parts = 1 if forward_pass.replicate else ranks // size
        shares = _shares(rollouts, parts, shares_prefixes=forward_pass.shares_prefixes)
        calls = self._forward_calls.setdefault(forward_pass.name, [])
        for rank in range(ranks):
            share = shares[0 if forward_pass.replicate else rank // size]
            sequences = Records(rollout.sequence() for rollout in share)
            if forward_pass.name != "policy":  # the experts are the policy's
                sequences = Records(replace(sequence, experts=None) for sequence in sequences)
            send = partial(self._send_forward_pass, forward_pass, rank, sequences)
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
        pending = {group.names[call.rank]: call.result}
        self.meanwhile(pending, self.seconds)  # What it raises is about other processes.
        try:
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


def _whole_groups(rollouts: Sequence[Rollout], ranks: int) -> list[list[Rollout]]:
    """Split rollouts over ranks by their number; all responses to a prompt stay together."""
    groups: dict[int, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.key.prompt, []).append(rollout)
    lists = list(groups.values())
    return [[rollout for index in part for rollout in lists[index]] for part in balance([len(one) for one in lists], ranks)]


def _shares(rollouts: Sequence[Rollout], ranks: int, *, shares_prefixes: bool) -> list[list[Rollout]]:
    """Split rollouts over ranks by tokens.

    With `shares_prefixes` those with a common beginning stay together, if it is long enough to share.
    """
    if ranks == 1:
        return [list(rollouts)]
    tokens = [rollout.sequence().token_ids for rollout in rollouts]
    order = in_prefix_order(tokens) if shares_prefixes else None
    parts = order.row_parts(ranks) if order is not None and order.pays else balance([len(one) for one in tokens], ranks)
    return [[rollouts[index] for index in part] for part in parts]
