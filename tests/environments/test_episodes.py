"""Samples with several turns in a step: failures, credit and masks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rayrlhf.algorithms.gae import gae
from rayrlhf.config.loading.load import load_config
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.rollout import EnvironmentSection
from rayrlhf.data.records import SEGMENT_STRIDE, Prompt, Rollout, SampleKey, TokenScores
from rayrlhf.environments.episodes import episode_metrics, sample_votes, turns, with_extra_segments, without_failed
from rayrlhf.errors import AlarmError, UserError
from rayrlhf.ppo.experience import ExperienceMaker
from rayrlhf.ppo.group_filter import GroupFilter
from rayrlhf.ppo.scoring import ScoredRollouts
from rayrlhf.rewards.rollout_rewards import environment
from rayrlhf.rewards.score import RewardBatch

BASE = [
    "model.path=builtin:tiny",
    "reward.functions=[{name: environment, weight: 2}]",
    "data.train.path=prompts.jsonl",
    "environment.name=guessing",
]
HOLES = [
    [True, True, False, False, False, True, True, True],
    [False, True, False, True, True],
    [True, True, True],
]


def load(*overrides):
    return load_config(PPOConfig, None, [*BASE, *overrides])


def played(mask, rewards, number, random):
    mask = np.array(mask)
    return Rollout(
        key=SampleKey(0, number, 0),
        prompt_ids=np.zeros(1, np.int32),
        response_ids=random.integers(3, 200, len(mask)).astype(np.int32),
        action_mask=mask,
        logprobs=np.where(mask, -random.random(len(mask)), 0).astype(np.float32),
        versions=np.zeros(len(mask), np.int32),
        finish_reason="stop",
        text="",
        seed=0,
        rewards=np.array(rewards, np.float32),
    )


def scored(rollouts, values, policy, reference):
    readings = {
        "policy": [TokenScores(logprobs=row) for row in policy],
        "reference": [TokenScores(logprobs=row) for row in reference],
        "critic": [TokenScores(values=row) for row in values],
    }
    sums = np.array([2 * rollout.rewards.sum() for rollout in rollouts], np.float32)
    prompts = {rollout.key.prompt: Prompt(rollout.key.prompt, "", rollout.prompt_ids) for rollout in rollouts}
    return ScoredRollouts(tuple(rollouts), RewardBatch(sums, {}), readings, prompts)


def case(seed=0):
    """Three samples with holes; rewards at the ends of turns."""
    random = np.random.default_rng(seed)
    rewards = [[0, 0.5, 0, 0, 0, 0, 0, 1], [0, -0.25, 0, 0, 1], [0, 0, 1]]
    rollouts = [played(mask, reward, index, random) for index, (mask, reward) in enumerate(zip(HOLES, rewards, strict=True))]

    def rows(extra=0):
        return [-random.random(len(mask) + extra).astype(np.float32) for mask in HOLES]

    return rollouts, rows(1), rows(), rows()


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_a_perfect_constant_critic_gives_no_advantage_across_an_environments_words(lam):
    # Nothing is earned before the end, where the score is what the critic says everywhere.
    mask = torch.tensor([row + [False] * (8 - len(row)) for row in HOLES])
    last = 7 - mask.flip(1).int().argmax(1)
    rewards = torch.zeros(3, 8).scatter(1, last[:, None], 0.7)
    values = torch.where(mask, 0.7, torch.randn(3, 8))
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=lam)
    assert advantages.abs().max() < 1e-6
    assert torch.allclose(returns[mask], torch.tensor(0.7))
    naive, _ = gae(rewards, values, mask, gamma=1.0, lam=lam, skip_masked=False)
    assert (naive[mask].abs().max() > 0.03) == (lam < 1)  # At 1 the values cancel whatever is between.


def test_advantages_are_those_of_the_sampled_tokens_alone_whatever_stands_between():
    rollouts, values, policy, reference = case()
    config = load("algorithm.advantage.whiten=false", "algorithm.kl.coefficient=0.1", "algorithm.advantage.gamma=0.97")
    experience = ExperienceMaker(config).make(scored(rollouts, values, policy, reference))
    squeezed = []
    for rollout in rollouts:
        mask = rollout.action_mask
        squeezed.append(
            replace(
                rollout,
                **{
                    name: getattr(rollout, name)[mask]
                    for name in ("response_ids", "action_mask", "logprobs", "versions", "rewards")
                },
            )
        )

    def cut(rows):
        return [row[: len(mask)][np.array(mask)] for row, mask in zip(rows, HOLES, strict=True)]

    alone = ExperienceMaker(config).make(scored(squeezed, cut(values), cut(policy), cut(reference)))
    for index, mask in enumerate(HOLES):
        count = sum(mask)
        for name in ("advantages", "returns", "old_logprobs"):
            row = experience.batch.arrays[name][index, : len(mask)][np.array(mask)]
            np.testing.assert_allclose(row, alone.batch.arrays[name][index, :count], atol=1e-6)
    for name in ("action_mask", "value_mask"):
        assert experience.batch.arrays[name].tolist() == [row + [False] * (8 - len(row)) for row in HOLES]
    np.testing.assert_allclose(experience.kl, alone.kl, atol=1e-6)
    for name, value in alone.metrics.items():
        assert experience.metrics[name] == pytest.approx(value, abs=1e-6), name


def test_what_stands_at_an_environments_tokens_reaches_nothing():
    rollouts, values, policy, reference = case()
    before = ExperienceMaker(load()).make(scored(rollouts, values, policy, reference))
    for rows in (values, policy, reference):
        for row, mask in zip(rows, HOLES, strict=True):
            row[: len(mask)][~np.array(mask)] = 50.0
    after = ExperienceMaker(load()).make(scored(rollouts, values, policy, reference))
    assert before.metrics == after.metrics
    mask = before.batch.arrays["action_mask"]
    for name in ("advantages", "returns"):
        assert (before.batch.arrays[name][mask] == after.batch.arrays[name][mask]).all()


@pytest.mark.parametrize(("credit", "paid"), [("turn", [0, 1, 0, 0, 0, 0, 0, 2]), ("episode", [0, 0, 0, 0, 0, 0, 0, 3])])
def test_rewards_are_paid_where_the_config_says(credit, paid):
    rollouts, values, policy, reference = case()
    zeros = [np.zeros_like(row) for row in values]
    config = load(f"environment.credit={credit}", "algorithm.advantage.whiten=false", "algorithm.kl.coefficient=0")
    config = config.model_copy(
        update={
            "algorithm": config.algorithm.model_copy(
                update={"advantage": config.algorithm.advantage.model_copy(update={"lam": 0.0})}
            )
        }
    )
    experience = ExperienceMaker(config).make(scored(rollouts, zeros, policy, reference))
    assert experience.batch.arrays["advantages"][0].tolist() == pytest.approx(paid)


def test_failed_samples_are_left_out_until_they_are_too_many():
    random = np.random.default_rng(0)
    good = [played([True], [1], index, random) for index in range(4)]
    bad = replace(good[1], failure="RuntimeError: broken")
    section = EnvironmentSection(name="guessing", max_failed_share=0.3, failed_floor=0)
    assert list(without_failed([[good[0], bad], [bad], [good[2]]], 10, section)) == [[good[0]], [good[2]]]
    with pytest.raises(
        AlarmError, match=r"2 of 4 samples failed.*max_failed_share 0.3; prompt 1, sample 0: RuntimeError: broken"
    ):
        list(without_failed([good, [bad], [bad]], 4, section))
    floor = section.model_copy(update={"failed_floor": 2})
    assert list(without_failed([good, [bad], [bad]], 8, floor)) == [good]
    with pytest.raises(AlarmError, match="2 of 2 samples failed"):
        list(without_failed([[bad], [bad]], 2, floor))


def test_turns_and_the_environments_tokens_are_counted():
    rollouts, *_ = case()
    assert [turns(rollout) for rollout in rollouts] == [2, 2, 1]
    assert episode_metrics(rollouts, 4) == {
        "environment/turns": 5 / 3,
        "environment/tokens": 5 / 3,
        "environment/segments": 1,
        "environment/stretches": 1,
        "environment/failed": 0.25,
    }


def test_further_segments_are_samples_of_their_group_and_counted_apart():
    rollouts, *_ = case()
    other = replace(rollouts[1], key=SampleKey(0, 0, SEGMENT_STRIDE))
    several = [replace(rollouts[0], extra_segments=(other,)), rollouts[2]]
    parts = with_extra_segments(several)
    assert sample_votes(parts).tolist() == [0.5, 0.5, 1.0]
    assert [part.key for part in parts] == [rollouts[0].key, other.key, rollouts[2].key]
    metrics = episode_metrics(parts, 4)
    assert (metrics["environment/segments"], metrics["environment/failed"]) == (1.5, 0.5)
    harvest = GroupFilter(1, 2, 0)
    pair = [replace(rollouts[2], key=SampleKey(0, 0, sample)) for sample in (0, 1)]
    drawn = [*pair, other]
    harvest.add(drawn, {pair[0].key: 0.0, pair[1].key: 1.0, other.key: 0.0})
    assert harvest.rollouts() == drawn  # One draw of one prompt, and all of it tells.


def test_the_reward_function_sums_what_was_paid_and_needs_an_environment():
    rollouts, *_ = case()
    assert environment(rollouts) == [1.5, 0.75, 1.0]
    with pytest.raises(UserError, match="give an `environment:` section"):
        environment([replace(rollouts[0], rewards=None)])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["environment=null"], "needs the section environment"),
        (["algorithm.advantage.estimator=remax"], "which may fail in an environment"),
        (["algorithm.shaping.clip=5"], "environment.credit to 'episode'"),
        (["environment.template=said"], "expected {observation} exactly once"),
        (["environment.max_turn=3"], "max_turns"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(UserError) as caught:
        load(*overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize("estimator", ["gae", "reinforce++"])
def test_a_function_that_pays_turns_does_what_an_environment_that_pays_turns_does(estimator):
    rollouts, values, policy, reference = case()
    settings = [f"algorithm.advantage.estimator={estimator}", *(["critic.kind=none"] if estimator != "gae" else [])]
    paid = scored(rollouts, values, policy, reference)
    expected = ExperienceMaker(load(*settings)).make(paid)
    unpaid = tuple(replace(rollout, rewards=None) for rollout in rollouts)
    rewards = RewardBatch(paid.rewards.scores, {}, [2 * rollout.rewards for rollout in rollouts])
    found = ExperienceMaker(load("reward.functions=[{name: length}]", *settings)).make(
        replace(paid, rollouts=unpaid, rewards=rewards)
    )
    at_end = ExperienceMaker(load("reward.functions=[{name: length}]", *settings)).make(
        replace(paid, rollouts=unpaid, rewards=RewardBatch(paid.rewards.scores, {}))
    )
    for name, array in expected.batch.arrays.items():
        np.testing.assert_allclose(found.batch.arrays[name], array, rtol=0, atol=1e-6, err_msg=name)
    assert np.abs(at_end.batch.arrays["advantages"] - expected.batch.arrays["advantages"]).max() > 0.01


def test_rewards_of_tokens_are_refused_next_to_what_changes_whole_scores():
    with pytest.raises(UserError, match=r"those of tokens and turns.*reward function 'length'"):
        load("reward.functions=[{name: length, per: turn}]", "algorithm.shaping.clip=1.0")
