"""An evaluation with a real engine: answers, scores, intervals; done once, and refused with another configuration."""

import pytest

from rayrlhf.config.evaluate import EvaluateConfig
from rayrlhf.config.load import load_config
from rayrlhf.errors import UserError
from rayrlhf.evaluation.run import ANSWERS, check_evaluation, evaluate_model, read_result
from rayrlhf.observe.samples import read_samples

SETTINGS = [
    "model.path=builtin:tiny?layers=1&hidden=64&context=64",
    "data.path=builtin:sums?count=12",
    "data.split=evaluation",
    "data.chat=false",
    "reward.functions=[{name: gsm8k}, {name: length, weight: 0, arguments: {soft_limit: 2, hard_limit: 4}}]",
    "rollout.backend=transformers",
    "rollout.max_new_tokens=4",
]


def config(folder, *overrides):
    return load_config(EvaluateConfig, None, [*SETTINGS, f"run.root={folder}", *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, evaluate_model(config(folder))


def test_every_prompt_has_an_answer_and_every_part_an_interval(finished):
    _, result = finished
    answers = list(read_samples(result.folder / ANSWERS))
    assert [row["prompt_id"] for row in answers] == list(range(12))
    assert result.prompts == 12
    assert set(result.parts) == {"gsm8k", "length"}
    assert result.score.mean == pytest.approx(sum(row["score"] for row in answers) / 12)
    assert "score over 12 prompts" in result.lines()[0]


def test_a_finished_evaluation_is_read_and_not_repeated(finished, monkeypatch):
    folder, result = finished
    monkeypatch.setattr("rayrlhf.evaluation.run.build_rollout_engine", None)
    assert evaluate_model(config(folder)) == result == read_result(result.folder)


def test_another_configuration_under_the_same_name_is_refused(finished):
    folder, _ = finished
    with pytest.raises(UserError, match=r"another configuration \(temperature: 0.0 -> 1.0\)"):
        evaluate_model(config(folder, "temperature=1.0"))


def test_the_check_counts_prompts_and_refuses_lengths_that_do_not_fit(tmp_path):
    assert "prompts: 12 of builtin:sums" in check_evaluation(config(tmp_path))
    with pytest.raises(UserError, match="exceed the 64 tokens"):
        check_evaluation(config(tmp_path, "data.max_prompt_tokens=63"))
