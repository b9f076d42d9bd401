"""Reward functions written for TRL's trainers run unchanged."""

import numpy as np
import pytest

from rayrlhf.config.reward import RewardFunctionSection, RewardSection
from rayrlhf.data.records import Prompt, SampleKey
from rayrlhf.errors import UserError
from rayrlhf.rewards.functions import ScoringBatch, load_functions
from rayrlhf.rewards.score import run_functions

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2"}]


def plain(completions, **kwargs):
    """The form of TRL's guide for text."""
    return [float(len(completion)) for completion in completions]


def conversational(prompts, completions, answer, **kwargs):
    """The form of TRL's guide for conversations, with a dataset column by name."""
    contents = [completion[0]["content"] for completion in completions]
    assert all(completion[0]["role"] == "assistant" for completion in completions)
    assert [turns[-1]["content"] for turns in prompts] == ["2 + 2"] * len(prompts)
    return [1.0 if content == truth else None for content, truth in zip(contents, answer, strict=True)]


def by_ids(completion_ids, trainer_state, **kwargs):
    return [float(len(ids) + trainer_state.global_step) for ids in completion_ids]


def ours(responses, **columns):
    assert not {"completions", "completion_ids", "trainer_state"} & set(columns)
    return [0.0 for _ in responses]


def batch(make_rollout, messages):
    prompts = [Prompt(index, "2 + 2", np.ones(3, np.int32), {"answer": "4"}, messages=messages) for index in range(2)]
    return ScoringBatch.of_rollouts(prompts, [make_rollout(text) for text in ("4", "five")])


def values(name, scored):
    section = RewardSection(functions=[RewardFunctionSection(name=f"tests.rewards.test_trl_functions:{name}")])
    return run_functions(load_functions(section), scored).parts[name].tolist()


@pytest.fixture
def make_rollout():
    from rayrlhf.data.records import Rollout

    def make(text):
        size = len(text)
        return Rollout(
            SampleKey(7, 0, 0),
            np.ones(3, np.int32),
            np.arange(size, dtype=np.int32),
            np.ones(size, np.bool_),
            np.zeros(size, np.float32),
            np.zeros(size, np.int32),
            "stop",
            text,
            0,
        )

    return make


def test_completions_are_text_where_prompts_are(make_rollout):
    assert values("plain", batch(make_rollout, None)) == [1.0, 4.0]


def test_completions_are_messages_where_prompts_are_and_none_does_not_apply(make_rollout):
    found = values("conversational", batch(make_rollout, TURNS))
    assert found[0] == 1.0
    assert np.isnan(found[1])


def test_token_ids_and_the_step_are_there_for_functions_that_name_them(make_rollout):
    assert values("by_ids", batch(make_rollout, None)) == [8.0, 11.0]


def test_other_functions_get_no_new_columns(make_rollout):
    assert values("ours", batch(make_rollout, TURNS)) == [0.0, 0.0]


def test_a_cached_function_cannot_read_token_ids():
    section = RewardSection(functions=[RewardFunctionSection(name="tests.rewards.test_trl_functions:by_ids", cache=True)])
    with pytest.raises(UserError, match="reads completion_ids, which are never equal: expected cache: false"):
        load_functions(section)
