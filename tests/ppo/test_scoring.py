"""A scoring call that is not answered is asked again of another process, with the same arguments; the actors are stand-ins."""

import numpy as np
import pytest

from rayrlhf.data.records import Prompt, Rollout, SampleKey
from rayrlhf.errors import ActorLostError, DeadlineError
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.ppo.scoring import ForwardPass, Scorer
from rayrlhf.rewards.score import RewardBatch

ONE = np.ones(1, dtype=np.int32)


class Process:
    """Answers with lengths, or not at all; keeps what it was asked."""

    def __init__(self, answers=True):
        self.answers, self.asked = answers, []

    def score(self, *arguments):
        self.asked.append(arguments)
        scores = np.array([len(rollout.text) for rollout in arguments[-1]], np.float32) if len(arguments) == 2 else None
        return self, scores


class Group:
    def __init__(self, role, *handles):
        self.handles, self.names = handles, tuple(f"run/{role}/{rank}" for rank in range(len(handles)))

    def __len__(self):
        return len(self.handles)

    def score(self, rank, *arguments):
        return self.handles[rank].score(*arguments)

    def wait(self, pending, what, seconds):
        ((process, scores),) = pending.values()
        if not process.answers:
            raise DeadlineError(f"{what}: no response from {next(iter(pending))} within {seconds:.0f} s")
        return [RewardBatch(scores, {})]


class ActorRestarter:
    """Gives out spare processes; raises when there is none left, as after too many rebuilds in a row."""

    def __init__(self, *spare):
        self.spare, self.errors = list(spare), []

    def restart_lost(self, role, rank, lost, error):
        self.errors.append((role, rank, lost, error))
        if not self.spare:
            raise error
        handle = self.spare.pop(0)
        self.actor_groups[role].handles = (handle,)
        return handle


def rollouts():
    prompt = Prompt(0, "a prompt", ONE)
    made = [
        Rollout(SampleKey(1, 0, index), ONE, ONE, ONE.astype(bool), ONE.astype(np.float32), ONE, "stop", "x" * index, 0)
        for index in range(4)
    ]
    return {0: prompt}, made


def scorer(actor_groups, restarter, forward_passes=()):
    prompts, made = rollouts()
    restarter.actor_groups = actor_groups
    found = Scorer(actor_groups, restarter, forward_passes, prompts, overlap=False, seconds=15.0, timer=PhaseTimer())
    found.add(made)
    return found


def test_a_reward_that_does_not_answer_in_time_is_replaced_and_its_call_repeated():
    stuck, again, good = Process(answers=False), Process(answers=False), Process()
    restarter = ActorRestarter(again, good)
    scored = scorer({"reward": Group("reward", stuck)}, restarter).finish()
    assert scored.rewards.scores.tolist() == [0, 1, 2, 3]
    assert stuck.asked == again.asked == good.asked
    assert [(role, rank, lost) for role, rank, lost, _ in restarter.errors] == [("reward", 0, stuck), ("reward", 0, again)]
    assert all(isinstance(error, ActorLostError) and error.actor == "run/reward/0" for *_, error in restarter.errors)


def test_one_that_never_answers_ends_the_run_with_what_was_waited_for():
    with pytest.raises(ActorLostError, match="reward: no response from run/reward/0 within 15 s"):
        scorer({"reward": Group("reward", Process(answers=False))}, ActorRestarter()).finish()


class Policy:
    """Returns what it reads."""

    def __init__(self, ranks):
        self.handles, self.names = range(ranks), tuple(f"run/policy/{rank}" for rank in range(ranks))

    def __len__(self):
        return len(self.handles)

    def score(self, rank, sequences, *_):
        return list(sequences)

    def wait(self, pending, what, seconds):
        return list(pending.values())


def keys_by_rank(forward_pass):
    """Which rollouts each of four ranks reads."""
    found = scorer({"reward": Group("reward", Process()), "policy": Policy(4)}, ActorRestarter(), [forward_pass])
    assert len(found.finish().forward_passes["old"]) == 4
    return [(call.rank, {key.sample for key in call.keys}) for call in found._forward_calls["old"]]


def test_ranks_that_share_rows_read_the_same_rollouts_and_groups_split_them():
    shared = dict(keys_by_rank(ForwardPass("old", "policy", frozenset({"logprobs"}), group=2)))
    assert shared[0] == shared[1]
    assert shared[2] == shared[3]
    assert (len(shared[0]), shared[0] | shared[2]) == (2, {0, 1, 2, 3})
    replicated = keys_by_rank(ForwardPass("old", "policy", frozenset({"logprobs"}), replicate=True, group=2))
    assert replicated == [(rank, {0, 1, 2, 3}) for rank in range(4)]


def test_a_policy_that_is_late_is_not_replaced_because_it_carries_the_training_state():
    actor_groups = {"reward": Group("reward", Process()), "policy": Group("policy", Process(answers=False))}
    restarter = ActorRestarter(Process())
    with pytest.raises(DeadlineError, match="old: no response from run/policy/0"):
        scorer(actor_groups, restarter, [ForwardPass("old", "policy", frozenset({"logprobs"}))]).finish()
    assert restarter.errors == []
