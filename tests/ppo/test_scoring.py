"""A scoring call that is not answered is asked again of another process, with the same arguments; the actors are stand-ins."""

from dataclasses import replace

import numpy as np
import pytest

from rayrlhf.data.fingerprints import reward_seal
from rayrlhf.data.records import Prompt, Rollout, SampleKey, TokenScores
from rayrlhf.errors import ActorLostError, AlarmError, DeadlineError, UserError
from rayrlhf.observe.phases import PhaseTimer
from rayrlhf.ppo.reward_rows import RewardRow, add_judgments
from rayrlhf.ppo.scoring import ForwardPass, Scorer, _shares
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


class Chooser(Policy):
    """Returns the place of each sample as its experts."""

    def score(self, rank, sequences, *_):
        return [TokenScores(experts=np.full((2, 1, 1), index, np.uint8)) for index, _ in enumerate(sequences)]


def test_experts_of_the_old_log_probs_go_with_the_rollouts_into_the_update():
    actors = {"reward": Group("reward", Process()), "policy": Chooser(1)}
    policy = ForwardPass("policy", "policy", frozenset({"logprobs", "experts"}))
    scored = scorer(actors, ActorRestarter(), [policy]).finish()
    assert [int(rollout.sequence().experts[0, 0, 0]) for rollout in scored.rollouts] == [0, 1, 2, 3]


class Judge(Process):
    """Scores a response by half its length; none for the longest."""

    def score(self, prompts, made):
        self.asked.append((prompts, made))
        lengths = np.array([len(rollout.text) for rollout in made], np.float32) / 2
        parts = {"judge_model": np.where(lengths == 1.5, np.nan, lengths)}
        scores = np.nan_to_num(parts["judge_model"]).astype(np.float32)
        seals = [reward_seal(rollout, float(score), None) for rollout, score in zip(made, scores, strict=True)]
        return self, RewardBatch(scores, parts, None, seals)


class JudgeGroup(Group):
    def wait(self, pending, what, seconds):
        ((process, found),) = pending.values()
        if not process.answers:
            raise DeadlineError(f"{what}: no response from {next(iter(pending))} within {seconds:.0f} s")
        return [found]


class Functions(Judge):
    """A reward function that does not apply to the longest response but one."""

    def score(self, prompts, made):
        values = np.array([np.nan if len(rollout.text) == 2 else 1.0 for rollout in made], np.float32)
        return self, RewardBatch(np.nan_to_num(values), {"function": values})


def test_a_judges_scores_are_added_and_a_lost_judge_is_replaced():
    stuck, good = Judge(answers=False), Judge()
    restarter = ActorRestarter(good)
    groups = {"reward": JudgeGroup("reward", Functions()), "judge": JudgeGroup("judge", stuck)}
    rewards = scorer(groups, restarter).finish().rewards
    assert rewards.scores.tolist() == [1, 1.5, 1, 1]
    np.testing.assert_allclose(rewards.parts["judge_model"], [0, 0.5, 1, np.nan])
    np.testing.assert_allclose(rewards.parts["function"], [1, 1, np.nan, 1])
    assert stuck.asked == good.asked
    assert restarter.errors[0][:3] == ("judge", 0, stuck)
    _, made = rollouts()
    assert rewards.seals == [reward_seal(one, score, None) for one, score in zip(made, rewards.scores.tolist(), strict=True)]


def test_a_response_that_only_a_judge_scores_and_that_it_does_not_score_ends_the_run():
    with pytest.raises(UserError, match="no reward applies to sample 3 of prompt 0: all of judge_model gave none"):
        scorer({"judge": JudgeGroup("judge", Judge())}, ActorRestarter()).finish()


def test_a_judge_without_any_score_is_named_and_a_judgment_of_another_sample_is_found():
    _, made = rollouts()
    none = RewardRow(0.0, {"judge_model": float("nan")})
    judged, paid = {one.key: none for one in made}, {one.key: RewardRow(1.0, {"function": 1.0}) for one in made}
    with pytest.raises(UserError, match=r"reward.judge: no score for any of 8 responses"):
        add_judgments([*made, *made], judged, paid)
    assert [row.score for row in add_judgments(made, judged, paid).values()] == [1.0] * 4  # too few to tell
    sealed = {one.key: RewardRow(1.0, {"judge_model": 1.0}, None, reward_seal(made[0], 1.0, None)) for one in made}
    with pytest.raises(AlarmError, match="step 2: sample 1 of prompt 0 has the reward 1, which was computed for another one"):
        add_judgments(made, sealed, None)


def test_a_judge_that_compares_gets_whole_groups_when_all_have_arrived():
    prompt, made = Prompt(0, "a prompt", ONE), rollouts()[1]
    groups = {"judge": JudgeGroup("judge", Functions(), Functions())}
    found = Scorer(
        groups, ActorRestarter(), (), {0: prompt, 1: prompt}, overlap=True, seconds=1.0, timer=PhaseTimer(), compares=True
    )
    for prompt_id in (0, 1):
        for one in made[:2]:
            found.add([replace(one, key=one.key._replace(prompt=prompt_id))])
    assert not found._reward_calls
    calls = found._start_reward("judge", found._rollouts) or found._reward_calls["judge"]
    assert [sorted((key.prompt, key.sample) for key in call.keys) for call in calls] in (
        [[(0, 0), (0, 1)], [(1, 0), (1, 1)]],
        [[(1, 0), (1, 1)], [(0, 0), (0, 1)]],
    )


def test_a_policy_that_is_late_is_not_replaced_because_it_carries_the_training_state():
    actor_groups = {"reward": Group("reward", Process()), "policy": Group("policy", Process(answers=False))}
    restarter = ActorRestarter(Process())
    with pytest.raises(DeadlineError, match="old: no response from run/policy/0"):
        scorer(actor_groups, restarter, [ForwardPass("old", "policy", frozenset({"logprobs"}))]).finish()
    assert restarter.errors == []


def test_a_loss_during_the_wait_is_not_taken_for_one_of_the_process_that_is_waited_for():
    reward, restarter = Process(), ActorRestarter(Process())
    found = scorer({"reward": Group("reward", reward)}, restarter)

    def meanwhile(pending, seconds):
        raise ActorLostError("rollout replicas: 0 of 1 serve, 1 are needed")

    found.meanwhile = meanwhile
    with pytest.raises(ActorLostError, match="rollout replicas: 0 of 1 serve"):
        found.finish()
    assert restarter.errors == []
    assert len(reward.asked) == 1


def test_only_roles_that_share_prefixes_are_split_by_distinct_tokens():
    made = []
    for sample in range(16):
        response = np.full(9000 if sample == 0 else 1500, sample + 4000, np.int32)
        mask, logprobs = np.ones(len(response), dtype=bool), np.zeros(len(response), np.float32)
        key, prompt = SampleKey(1, 0, sample), np.arange(4000, dtype=np.int32)
        made.append(Rollout(key, prompt, response[:1000], mask[:1000], logprobs[:1000], response[:1000], "stop", "", 0))
    made[0] = replace(made[0], prompt_ids=made[0].prompt_ids[::-1].copy())

    def sizes(*, shared):
        return sorted(len(part) for part in _shares(made, 2, shares_prefixes=shared))

    assert sizes(shared=False) == [8, 8]
    assert sizes(shared=True) != [8, 8]
