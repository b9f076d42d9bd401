"""How a reward function is bound and called."""

import functools
from typing import Any

import numpy as np
import pytest

from rayrlhf.config.reward import RewardFunctionSection, RewardSection
from rayrlhf.data.records import Prompt, Rollout, SampleKey
from rayrlhf.errors import UserError
from rayrlhf.rewards.functions import BoundFunction, ScoringBatch, load_functions

IDS = np.arange(2, dtype=np.int32)


def rollout(text: str) -> Rollout:
    return Rollout(SampleKey(0, 0, 0), IDS, IDS, IDS >= 0, IDS.astype(np.float32), IDS, "stop", text, 0)


BATCH = ScoringBatch.of_rollouts(
    [Prompt(0, "p0", IDS, {"answer": 1}), Prompt(1, "p1", IDS, {"answer": 2, "extra": "x"})], [rollout("r0"), rollout("r1")]
)


def seen_by(function: Any, **arguments: Any) -> Any:
    return BoundFunction("f", function, 1.0, arguments).call(BATCH)


def test_a_function_is_given_exactly_what_its_signature_names():
    assert seen_by(lambda responses: responses) == ["r0", "r1"]
    assert seen_by(lambda prompts, answer: [prompts, answer]) == [["p0", "p1"], [1, 2]]
    assert seen_by(lambda extra, finish_reasons: [extra, finish_reasons]) == [[None, "x"], ["stop", "stop"]]
    assert [r.text for r in seen_by(lambda *, rollouts: rollouts)] == ["r0", "r1"]


def test_a_function_that_takes_all_columns_gets_them():
    def takes_all(prompts: list[str], **columns: list) -> list[str]:
        return sorted(columns)

    assert seen_by(takes_all) == ["answer", "extra", "finish_reasons", "responses", "rollouts"]


def test_arguments_are_bound_and_win_over_a_column():
    assert seen_by(lambda responses, answer, bonus=1: (answer, bonus), answer="set", bonus=2) == ("set", 2)


def test_a_missing_column_is_named_with_those_there_are():
    with pytest.raises(UserError, match=r"'f' needs column 'anwser'; the dataset's columns are: answer, extra"):
        seen_by(lambda anwser: [])


def test_coroutine_functions_are_told_apart_however_they_are_written():
    async def judge(responses: list[str], model: str = "a") -> list[float]:
        return []

    class Judge:
        async def __call__(self, responses: list[str]) -> list[float]:
            return []

    for function in (judge, Judge(), functools.partial(judge, model="b")):
        assert BoundFunction("f", function).is_async
    assert not BoundFunction("f", lambda responses: []).is_async


def section(*entries: dict) -> RewardSection:
    return RewardSection(functions=[RewardFunctionSection(**entry) for entry in entries])


def test_a_function_listed_several_times_gets_a_name_for_each():
    loaded = load_functions(
        section(
            {"name": "format", "arguments": {"pattern": "a"}},
            {"name": "gsm8k", "weight": 2.0},
            {"name": "format", "arguments": {"pattern": "b"}, "weight": 0.5},
            {"name": "rayrlhf.rewards.formats:matches_format", "arguments": {"pattern": "c"}},
            {"name": "format", "arguments": {"pattern": "d"}},
        )
    )
    assert [(f.name, f.weight) for f in loaded] == [
        ("format", 1.0),
        ("gsm8k", 2.0),
        ("format_2", 0.5),
        ("matches_format", 1.0),
        ("format_3", 1.0),
    ]
    assert loaded[2].arguments == {"pattern": "b"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patern": "a"}, "'format' takes no argument 'patern'; did you mean 'pattern'?"),
        ({"zzz": 1}, "it takes pattern, match, ignore_case"),
        ({"responses": ["x"]}, "argument 'responses' comes from the batch"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_before_the_run(arguments: dict, message: str):
    with pytest.raises(UserError) as caught:
        load_functions(section({"name": "format", "arguments": arguments}))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "owner", "settings"),
    [
        ("reward_model", "model", {"model": {"model": {"path": "m"}}}),
        ("judge_model", "judge", {"judge": {"model": {"path": "m"}}}),
        ("judge_model_true", "judge", {"judge": {"model": {"path": "m"}, "criteria": [{"name": "true", "text": "Is it?"}]}}),
    ],
)
def test_a_function_with_the_name_of_a_models_part_is_refused_with_that_model(tmp_path, name, owner, settings):
    (tmp_path / "own.py").write_text(f"def {name}(responses):\n    return [1.0] * len(responses)\n")
    functions = [{"name": f"{tmp_path}/own.py:{name}"}]
    with pytest.raises(UserError, match=rf"the name '{name}' is that of a part of reward\.{owner}; rename it$"):
        load_functions(RewardSection.model_validate({"functions": functions} | settings))
    assert load_functions(RewardSection.model_validate({"functions": functions}))[0].name == name


def test_prompts_and_rollouts_must_pair_up():
    with pytest.raises(ValueError, match="1 prompts for 2 rollouts"):
        ScoringBatch.of_rollouts([Prompt(0, "p", IDS)], [rollout("a"), rollout("b")])
