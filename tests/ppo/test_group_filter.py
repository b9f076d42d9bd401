"""Prompts that teach nothing are replaced; the step keeps its size and no prompt is lost."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayrlhf.data.records import Rollout, SampleKey
from rayrlhf.observe.metric_names import SAMPLED_TOKENS
from rayrlhf.ppo.group_filter import GroupFilter


def rollout(prompt, sample, tokens=2):
    empty = np.zeros(tokens, dtype=np.int32)
    return Rollout(
        SampleKey(0, prompt, sample), empty, empty, empty.astype(bool), empty.astype(np.float32), empty, "stop", "", 0
    )


def draw(prompt, scores, first=0):
    rollouts = [rollout(prompt, first + index) for index in range(len(scores))]
    return rollouts, {item.key: score for item, score in zip(rollouts, scores, strict=True)}


def rounds(group_filter, *draws):
    rollouts, scores = [], {}
    for part, known in draws:
        rollouts += part
        scores |= known
    group_filter.add(rollouts, scores)


def test_a_prompt_without_contrast_is_replaced_by_another():
    group_filter = GroupFilter(prompts=2, samples_per_prompt=2, rounds=3)
    assert group_filter.missing == 2
    rounds(group_filter, draw(5, [1.0, 0.0]), draw(6, [1.0, 1.0]))
    assert group_filter.missing == 1
    rounds(group_filter, draw(7, [0.0, 0.0]))
    assert group_filter.missing == 1
    rounds(group_filter, draw(8, [0.0, 0.5]))
    assert group_filter.missing == 0
    assert [item.key.prompt for item in group_filter.rollouts()] == [5, 5, 8, 8]
    assert group_filter.metrics() == {"sampling/prompts": 4.0, "sampling/prompts_left_out": 2.0, SAMPLED_TOKENS: 16.0}


def test_when_the_rounds_are_used_up_the_step_is_filled_with_what_there_is():
    group_filter = GroupFilter(prompts=2, samples_per_prompt=2, rounds=1)
    rounds(group_filter, draw(5, [1.0, 1.0]), draw(6, [0.0, 0.0]))
    rounds(group_filter, draw(7, [2.0, 2.0]), draw(8, [0.0, 1.0]))
    assert group_filter.missing == 0
    assert [item.key.prompt for item in group_filter.rollouts()] == [8, 8, 5, 5]


def test_a_prompt_that_comes_twice_is_two_draws():
    group_filter = GroupFilter(prompts=2, samples_per_prompt=2, rounds=1)
    rounds(group_filter, draw(5, [1.0, 1.0]), draw(5, [0.0, 1.0], first=2))
    assert group_filter.missing == 1
    rounds(group_filter, draw(5, [1.0, 0.0], first=4))
    assert [item.key.sample for item in group_filter.rollouts()] == [2, 3, 4, 5]


@given(
    st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=40, max_size=40), st.integers(1, 5), st.integers(0, 4)
)
def test_every_step_is_full_and_prefers_contrast(outcomes, prompts, refills):
    group_filter, drawn = GroupFilter(prompts, 3, refills), 0
    while group_filter.missing:
        count = group_filter.missing
        rounds(
            group_filter, *(draw(drawn + index, [float(value) for value in outcomes[drawn + index]]) for index in range(count))
        )
        drawn += count
    kept = list(dict.fromkeys(item.key.prompt for item in group_filter.rollouts()))
    telling = [index for index in range(drawn) if len(set(outcomes[index])) > 1]
    assert len(kept) == prompts
    assert len(group_filter.rollouts()) == 3 * prompts
    assert kept[: len(telling)] == telling
    assert group_filter.metrics()["sampling/prompts"] == drawn
