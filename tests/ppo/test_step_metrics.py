"""What shows whether new weights arrived: trainer and sampler compared where both hold the same ones."""

from dataclasses import replace

import numpy as np
import pytest

from rayrlhf.data.records import Rollout, SampleKey
from rayrlhf.observe.metric_names import SCORE_ERROR
from rayrlhf.ppo.scoring import ScoredRollouts
from rayrlhf.ppo.step_metrics import cache_metrics, fresh_gap, reward_metrics
from rayrlhf.rewards.score import RewardBatch


def rollout(logprobs, versions, mask=None):
    count = len(logprobs)
    return Rollout(
        key=SampleKey(0, 0, 0),
        prompt_ids=np.ones(2, np.int32),
        response_ids=np.ones(count, np.int32),
        action_mask=np.ones(count, bool) if mask is None else np.array(mask),
        logprobs=np.array(logprobs, np.float32),
        versions=np.array(versions, np.int32),
        finish_reason="length",
        text="",
        seed=0,
    )


def gap(trainer, rows, version):
    counted = np.zeros(trainer.shape, bool)
    for row, one in zip(counted, rows, strict=True):
        row[: len(one.action_mask)] = one.action_mask
    return fresh_gap(trainer, counted, rows, version)


def test_only_tokens_of_the_newest_weights_are_compared():
    rows = [rollout([-1.0, -2.0, -3.0], [3, 4, 5]), rollout([-4.0], [5])]
    trainer = np.array([[-9.0, -9.0, -3.5], [-4.25, 0.0, 0.0]], np.float32)
    assert gap(trainer, rows, 5) == pytest.approx((0.5 + 0.25) / 2)
    assert gap(trainer, rows, 3) == pytest.approx(8.0)


def test_where_the_newest_weights_sampled_nothing_nothing_is_said():
    assert gap(np.zeros((1, 2), np.float32), [rollout([-1.0, -1.0], [1, 2])], 3) is None


def test_tokens_of_an_environment_do_not_count_and_what_was_sampled_before_the_first_sync_is_of_version_0():
    rows = [rollout([-1.0, 0.0], [-1, -1], mask=[True, False])]
    assert gap(np.array([[-1.5, -7.0]], np.float32), rows, 0) == pytest.approx(0.5)


def test_a_difference_that_is_no_number_stays_none():
    assert np.isnan(gap(np.full((1, 1), np.nan, np.float32), [rollout([-1.0], [0])], 0))


def test_the_cache_hit_rate_is_over_prompt_tokens_and_absent_without_a_cache():
    rows = [rollout([-1.0], [0]), rollout([-1.0], [0])]
    assert cache_metrics(rows) == {}
    counted = [replace(rows[0], read_tokens=30), replace(rows[1], read_tokens=70, cached_tokens=64)]
    assert cache_metrics(counted) == {"rollout/prefix_cache_hit_rate": 0.64}


def test_the_error_of_a_score_is_over_prompts_and_not_over_responses():
    rollouts = tuple(replace(rollout([-1.0], [0]), key=SampleKey(0, prompt, number)) for prompt in (7, 9) for number in (0, 1))
    scores = np.array([0.0, 1.0, 1.0, 1.0], np.float32)
    found = reward_metrics(ScoredRollouts(rollouts, RewardBatch(scores, {"one": scores}), {}, {}))
    assert found == {"reward/one": pytest.approx(0.75), SCORE_ERROR: pytest.approx(np.std([0.5, 1.0], ddof=1) / np.sqrt(2))}
    unknown = np.array([0.0, 1.0, 1.0, np.nan], np.float32)
    assert reward_metrics(ScoredRollouts(rollouts, RewardBatch(unknown, {}), {}, {}))[SCORE_ERROR] == found[SCORE_ERROR]
    assert SCORE_ERROR not in reward_metrics(ScoredRollouts(rollouts[:2], RewardBatch(scores[:2], {}), {}, {}))
